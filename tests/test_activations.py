import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import E4M3, E5M2, INT8_ASYM, quantize_tokens
from fpq_jax._numerics.activations import fake_quantize_tokens


def activations(tokens=(3, 5)):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*tokens, 100)) * np.exp(2 * rng.standard_normal((*tokens, 1)))
    x[..., 7] *= 60  # an outlier channel
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_token_codes_and_scales(fmt, dtype):
    x = activations().astype(dtype)
    codes, scale, zero = quantize_tokens(x, fmt)
    assert codes.dtype == fmt.dtype and scale.shape == (3, 5, 1) and scale.dtype == jnp.float32 and zero is None
    assert (np.abs(np.asarray(codes, np.float32)).max(axis=-1) == fmt.max).all()
    again = (np.asarray(codes, np.float32) * np.asarray(scale)).astype(dtype)
    np.testing.assert_array_equal(again, fake_quantize_tokens(x, fmt))


@pytest.mark.parametrize("fmt", [E4M3, INT8_ASYM], ids=str)
def test_many_tokens_are_quantized_as_few_are(fmt):
    x = activations((1500,))
    many = jax.jit(quantize_tokens, static_argnums=1)(x, fmt)
    few = jax.jit(quantize_tokens, static_argnums=1)(x[:9], fmt)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(few), strict=True):
        np.testing.assert_array_equal(np.asarray(a[:9]), np.asarray(b))


def test_gradients_pass_the_barrier():
    grad = jax.grad(lambda x: quantize_tokens(x, E4M3).scale.sum())(activations())
    assert np.isfinite(grad).all() and (np.abs(np.asarray(grad)).sum(axis=-1) > 0).all()

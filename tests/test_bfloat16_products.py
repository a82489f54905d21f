"""Products in the form that a platform is fast at, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax._matmul.bfloat16_products import array_product, float32_product


def operands(batch, contract, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    shape = (48, 40) if contract == 0 else (40, 48)
    x, w = rng.standard_normal((*batch, 48)), rng.standard_normal(shape)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def exact(x, w, contract):
    x, w = np.asarray(x.astype(jnp.float32), np.float64), np.asarray(w.astype(jnp.float32), np.float64)
    return x @ (w if contract == 0 else w.T)


BATCHES = [(1,), (2,), (5,), (1, 1), (2, 3), (1, 7), (0,), (0, 3)]


@pytest.mark.parametrize("contract", [0, 1])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
def test_float32_products_are_float64s_to_float32s_digits(batch, contract, dtype):
    x, w = operands(batch, contract, dtype)
    y = jax.jit(float32_product, static_argnums=2)(x, w, contract)
    assert y.dtype == jnp.float32 and y.shape == (*batch, 40)
    np.testing.assert_allclose(y, exact(x, w, contract), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("contract", [0, 1])
@pytest.mark.parametrize("batch", BATCHES)
def test_array_products_are_rounded_once(batch, contract):
    x, w = operands(batch, contract)
    y = array_product(x, w, contract)
    assert y.dtype == jnp.bfloat16 and y.shape == (*batch, 40)
    np.testing.assert_allclose(y.astype(jnp.float32), exact(x, w, contract), rtol=2.0**-8, atol=1e-4)


def test_other_arrays_are_multiplied_as_they_always_were():
    x, w = operands((3,), 0, jnp.float32)
    assert (array_product(x, w) == x @ w).all()
    mixed = array_product(x, w.astype(jnp.bfloat16))
    assert mixed.dtype == jnp.float32 and mixed.shape == (3, 40)
    assert array_product(x[0].astype(jnp.bfloat16), w.astype(jnp.bfloat16)).shape == (40,)


@pytest.mark.parametrize("contract", [0, 1])
def test_gradients_are_those_of_a_plain_product(contract):
    x, w = operands((2, 3), contract)
    of = lambda product: jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w).astype(jnp.float32))), argnums=(0, 1))
    plain = of(lambda x, w: x @ (w if contract == 0 else w.T))(x, w)
    for ours, theirs in zip(of(lambda x, w: array_product(x, w, contract))(x, w), plain, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.05, atol=0.05)

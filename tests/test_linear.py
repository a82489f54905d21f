import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fpq_jax import E4M3, E5M2, QuantSpec, dequantize, linear, lorc, quantize_array, quantize_tokens
from fpq_jax._linear import Observed, fake_quantize_tokens

SPECS = {
    "m2": QuantSpec(group_size=32, constraint="m2"),
    "m1": QuantSpec(group_size=32, constraint="m1"),
    "channel": QuantSpec(format=E4M3, group_size="channel"),
    "tensor": QuantSpec(format=E4M3, group_size="tensor"),
    "e5m2": QuantSpec(format=E5M2, group_size="channel", activation=E5M2),
    "mixed": QuantSpec(group_size="channel", activation=E5M2),
    "free": QuantSpec(group_size=32),
}


def operands(tokens=(3, 5), inputs=100, outputs=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*tokens, inputs)) * np.exp(2 * rng.standard_normal((*tokens, 1)))
    x[..., 7] *= 60  # an outlier channel
    w, bias = rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w, bias))


def plain(x, q, bias):
    """The arithmetic of the design, on dequantized operands, in float64."""
    fmt = q.spec.activation
    scale = (np.abs(np.asarray(x)).max(axis=-1, keepdims=True) * np.float32(1 / fmt.max)).astype(np.float32)
    codes = np.clip(np.asarray(x) / scale, -fmt.max, fmt.max).astype(ml_dtypes.finfo(fmt.dtype).dtype)
    weight = dequantize(q, low_rank=False)
    if not q.has_fp8_form:
        weight = weight.astype(jnp.bfloat16)
    y = (codes.astype(np.float64) * scale) @ np.asarray(weight).astype(np.float64)
    if q.low_rank is not None:
        bf16 = lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float64)
        a, b = bf16(q.low_rank.a), bf16(q.low_rank.b)
        y = y + bf16((bf16(x) @ a).astype(np.float32)) @ b
    return y + np.asarray(bias)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tokens", [(1,), (3, 5), (2, 2, 16)])
@pytest.mark.parametrize("name", SPECS)
def test_it_equals_the_plain_arithmetic_on_dequantized_operands(name, tokens, rank):
    x, w, bias = operands(tokens)
    q = quantize_array(w, SPECS[name])
    if rank:
        q = lorc(w, q, rank=rank)
    expected = plain(x, q, bias)
    for f in (linear, jax.jit(linear)):
        got = f(x, q, bias)
        assert got.dtype == x.dtype and got.shape == expected.shape
        # LoRC's inner activation is rounded to bfloat16, where float32's noise may turn a tie
        tolerance = 2e-4 if rank else 1e-6
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_the_product_is_one_fp8_dot_over_the_full_k():
    x, w, _ = operands()
    for name in ("m1", "m2", "channel", "e5m2"):
        text = str(jax.make_jaxpr(linear)(x, quantize_array(w, SPECS[name])))
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 1 and "preferred_element_type=float32" in text
        assert "f8_e4m3fn[24,100]" in text or "f8_e5m2[24,100]" in text


def test_quantized_activations_cost_little_and_outliers_do_not_break_them():
    x, w, _ = operands()
    q = quantize_array(w, SPECS["channel"])
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert np.linalg.norm(linear(x, q) - exact) < 0.05 * np.linalg.norm(exact)


def test_activations_left_alone_use_the_dequantized_weight():
    x, w, bias = operands()
    q = quantize_array(w, QuantSpec(group_size=32, activation=None))
    np.testing.assert_allclose(linear(x, q, bias), x @ dequantize(q) + bias, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_zero_tiny_and_huge_tokens_give_finite_outputs(name):
    _, w, _ = operands()
    q = quantize_array(w, SPECS[name])
    for value in (0.0, 1e-44, 1e-38, 1e-36, 1e30):
        y = linear(jnp.full((2, 100), value), q)
        assert np.isfinite(np.asarray(y)).all()
    assert (np.asarray(linear(jnp.zeros((2, 100)), q)) == 0).all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_token_codes_and_scales(fmt, dtype):
    x = operands()[0].astype(dtype)
    codes, scale = quantize_tokens(x, fmt)
    assert codes.dtype == fmt.dtype and scale.shape == (3, 5, 1) and scale.dtype == jnp.float32
    assert (np.abs(np.asarray(codes, np.float32)).max(axis=-1) == fmt.max).all()
    again = (np.asarray(codes, np.float32) * np.asarray(scale)).astype(dtype)
    np.testing.assert_array_equal(again, fake_quantize_tokens(x, fmt))


def test_an_observed_kernel_multiplies_and_records_the_quantized_input():
    x, w, bias = operands()
    seen = []
    y = linear(x, Observed(w, E4M3, lambda raw, quantized: seen.append((raw, quantized))), bias)
    assert seen[0][0] is x
    np.testing.assert_array_equal(seen[0][1], fake_quantize_tokens(x, E4M3))
    np.testing.assert_allclose(y, seen[0][1] @ w + bias, rtol=1e-6)


def test_gradients_reach_the_input_of_a_plain_kernel():
    x, w, _ = operands()
    np.testing.assert_allclose(
        jax.grad(lambda x: linear(x, w).sum())(x), np.broadcast_to(w.sum(1), x.shape), rtol=1e-4, atol=1e-5
    )

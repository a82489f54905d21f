import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import (
    E4M3,
    E5M2,
    FpqError,
    QuantSpec,
    dequantize,
    linear,
    lorc,
    make_mesh,
    quantize_array,
    quantize_tokens,
)
from fpq_jax._matmul.linear import RowParallelKernel
from fpq_jax._matmul.products import product_kind, static_scale
from fpq_jax._matmul.weight_layouts import to_layout
from fpq_jax._numerics.scales import range_scale

SPECS = {
    "m2": QuantSpec(group_size=32, constraint="m2"),
    "m1": QuantSpec(group_size=32, constraint="m1"),
    "channel": QuantSpec(format=E4M3, group_size="channel"),
    "tensor": QuantSpec(format=E4M3, group_size="tensor"),
    "e5m2": QuantSpec(format=E5M2, group_size="channel", activation=E5M2),
    "mixed": QuantSpec(group_size="channel", activation=E5M2),
    "free": QuantSpec(group_size=32),
    "w8a8-int": QuantSpec(format="int8-asym", group_size="channel", activation="int8-asym"),
    "w8a8-int-symmetric": QuantSpec(format="int8", group_size="channel", activation="int8"),
    "w8a8-int-fp": QuantSpec(format="int8-asym", group_size="channel"),
    "w4a4-int": QuantSpec(format="int4-asym", group_size="channel", activation="int4-asym"),
    "w4a4-int-symmetric": QuantSpec(format="int4", group_size="channel", activation="int4"),
    "w4a8-int": QuantSpec(format="int4-asym", group_size=32, activation="int8-asym"),
    "w4a8-int-fp": QuantSpec(format="int4", group_size=32),
    "w4a8-int-m2": QuantSpec(format="int4", group_size=32, constraint="m2"),
    "w4a8-fp-int": QuantSpec(group_size=32, constraint="m2", activation="int8-asym"),
    "qtorch": QuantSpec(format="e4m3-qtorch", group_size="channel", activation="e4m3-qtorch"),
    "static": QuantSpec(group_size=32, constraint="m2", activation_scale="static"),
    "static-int": QuantSpec(format="int8", group_size="channel", activation="int8-asym", activation_scale="static"),
}
QUICK = [(name, 4) for name in ("m2", "free", "w8a8-int")]
IN_BFLOAT16 = ("free", "w4a8-int", "w4a8-int-fp")  # their weights are rounded to it


def operands(tokens=(3, 5), inputs=100, outputs=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*tokens, inputs)) * np.exp(2 * rng.standard_normal((*tokens, 1)))
    x[..., 7] *= 60  # an outlier channel
    w, bias = rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w, bias))


def quantized_activations(x, q):
    """By each format's definition; float32 where a rounding may hang on it."""
    x, name = np.asarray(x), q.spec.activation.name
    if q.spec.activation_scale == "static":
        s = np.asarray(q.input_scale)
        z = np.float32(0) if q.input_zero is None else np.asarray(q.input_zero, np.float32)
    elif name.endswith("-asym"):
        low, high = np.minimum(x.min(axis=-1, keepdims=True), 0), np.maximum(x.max(axis=-1, keepdims=True), 0)
        s = (high - low) * np.float32(1 / q.spec.activation.max)
        z = np.rint(-low / s)
    else:
        s, z = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / q.spec.activation.max), np.float32(0)
    v = x / s
    if name.startswith("int"):
        low, high = {"int8": (-127, 127), "int8-asym": (0, 255), "int4-asym": (0, 15), "int4": (-7, 7)}[name]
        v = np.clip(np.rint(v) + z, low, high) - z
    elif name == "e4m3-qtorch":  # ties away from zero
        spacing = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(v), 1e-9))) - 3), 2.0**-9)
        v = np.copysign(np.minimum(np.floor(np.abs(v) / spacing + 0.5) * spacing, 480), v)
    else:
        dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
        largest = float(ml_dtypes.finfo(dtype).max)
        v = np.clip(v, -largest, largest).astype(dtype)
    return v.astype(np.float64) * s


def quantized(w, spec, x=None):
    """Rounded, with a static scale that clips some of ``x``."""
    q = quantize_array(w, spec)
    if spec.activation_scale == "static":
        low, high = (0.2 * float(f(operands()[0] if x is None else x)) for f in (jnp.min, jnp.max))
        fixed = range_scale(jnp.array([low]), jnp.array([high]), spec.activation)
        q = dataclasses.replace(
            q,
            input_scale=fixed.scale,
            input_zero=fixed.zero.astype(jnp.uint8) if spec.activation.asymmetric else None,
        )
    return q


def plain(x, q, bias):
    """The arithmetic of the design, on dequantized operands, in float64."""
    weight = dequantize(q, low_rank=False)
    if any(q.spec == SPECS[name] for name in IN_BFLOAT16):
        weight = weight.astype(jnp.bfloat16)
    y = quantized_activations(x, q) @ np.asarray(weight).astype(np.float64)
    if q.low_rank is not None:
        bf16 = lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float64)
        a, b = bf16(q.low_rank.a), bf16(q.low_rank.b)
        y = y + bf16((bf16(x) @ a).astype(np.float32)) @ b
    return y + np.asarray(bias)


@pytest.mark.parametrize(
    ("name", "tokens", "rank"),
    [
        *((name, (3, 5), rank) for name, rank in QUICK),
        *mostly_full(((name, (3, 5), rank) for name in SPECS for rank in (0, 4) if (name, rank) not in QUICK), 0),
        *mostly_full(((name, tokens, 4) for name in ("m2", "free", "w8a8-int") for tokens in ((1,), (2, 2, 16))), 0),
    ],
)
def test_it_equals_the_plain_arithmetic_on_dequantized_operands(name, tokens, rank):
    x, w, bias = operands(tokens)
    q = quantized(w, SPECS[name])
    if rank:
        q = lorc(w, q, rank=rank)
    expected = plain(x, q, bias)
    for f in (linear, jax.jit(linear)):
        got = f(x, q, bias)
        assert got.dtype == x.dtype and got.shape == expected.shape
        # LoRC's inner activation is rounded to bfloat16, and x / scale to a code, where float32's noise may turn a tie
        tolerance = 2e-4 if rank else 2e-6
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_the_product_is_one_fp8_dot_over_the_full_k():
    x, w, _ = operands()
    for name in ("m1", "m2", "channel", "mixed"):
        text = str(jax.make_jaxpr(linear)(x, quantize_array(w, SPECS[name])))
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 1 and "preferred_element_type=float32" in text
        assert "f8_e4m3fn[32,112]" in text


def test_integers_meet_in_one_int8_dot_with_int32_accumulation():
    x, w, _ = operands()
    for name in ("w8a8-int", "w8a8-int-symmetric", "static-int", "w4a4-int", "w4a4-int-symmetric"):
        text = str(jax.make_jaxpr(linear)(x, quantized(w, SPECS[name])))
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 1 and "preferred_element_type=int32" in text and ":i32[3,5,24] = dot_general" in dots[0]
        assert "i8[24,100]" in text and "i8[3,5,100]" in text


@pytest.mark.parametrize("name", mostly_full(SPECS, 3))
def test_expanded_weights_multiply_in_the_same_way(name):
    x, w, _ = operands()
    q = quantized(w, SPECS[name])
    np.testing.assert_array_equal(linear(x, to_layout(q, "fp8")), linear(x, q))
    expected = {"m1": "fp8", "e5m2": "codes", "free": "dequantized", "w8a8-int": "int8", "w8a8-int-fp": "codes",
                "w4a8-fp-int": "codes", "w4a8-int": "dequantized", "w4a4-int-symmetric": "int8"}  # fmt: skip
    assert product_kind(q) == product_kind(to_layout(q, "fp8")) == expected.get(name, product_kind(q))


def test_integer_sums_beyond_int32_are_taken_in_float32():
    inputs = 36864  # OPT-66b's fc2
    q = quantize_array(
        jnp.ones((inputs, 1)), QuantSpec(format="int8-asym", group_size="channel", activation="int8-asym")
    )
    np.testing.assert_allclose(linear(jnp.ones((1, inputs)), q), [[inputs]], rtol=1e-6)


def test_int8_factors_correct_as_bfloat16_ones_do():
    x, w, _ = operands()
    q = quantized(w, SPECS["m2"])
    plain_error = np.asarray(linear(x, q) - x @ w)
    for dtype in ("bfloat16", "int8"):
        corrected = lorc(w, q, rank=8, dtype=dtype)
        added = np.asarray(linear(x, corrected) - linear(x, q))
        np.testing.assert_allclose(added, x @ corrected.low_rank.product(), atol=0.01 * np.abs(added).max())
        assert np.linalg.norm(plain_error + added) < 0.9 * np.linalg.norm(plain_error)


def test_a_nan_stays_one():
    _, w, _ = operands()
    for name in ("m2", "w8a8-int", "w8a8-int-symmetric", "w4a8-int"):
        y = linear(jnp.ones((2, 100)).at[1, 3].set(jnp.nan), quantized(w, SPECS[name]))
        assert np.isnan(y[1]).all() and np.isfinite(y[0]).all()


def test_a_static_scale_is_one_for_all_tokens_and_saturates():
    x, w, _ = operands()
    q = quantized(w, SPECS["static"])
    assert q.input_scale.shape == (1,)
    codes = quantize_tokens(x, E4M3, static_scale(q)).codes.astype(jnp.float32)
    assert float(jnp.abs(codes).max()) == 448 and int((jnp.abs(codes) == 448).sum()) > 1
    assert "reduce_max" not in str(jax.make_jaxpr(linear)(x, q))
    with pytest.raises(FpqError, match="no input_scale"):
        linear(x, quantize_array(w, SPECS["static"]))


def test_quantized_activations_cost_little_and_outliers_do_not_break_them():
    x, w, _ = operands()
    q = quantize_array(w, SPECS["channel"])
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert np.linalg.norm(linear(x, q) - exact) < 0.05 * np.linalg.norm(exact)


def test_activations_left_alone_use_the_dequantized_weight():
    x, w, bias = operands()
    q = quantize_array(w, QuantSpec(group_size=32, activation=None))
    np.testing.assert_allclose(linear(x, q, bias), x @ dequantize(q) + bias, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", mostly_full(SPECS, 3))
def test_zero_tiny_and_huge_tokens_give_finite_outputs(name):
    _, w, _ = operands()
    q = quantized(w, SPECS[name])
    for value in (0.0, 1e-44, 1e-38, 1e-36, 1e30):
        y = linear(jnp.full((2, 100), value), q)
        assert np.isfinite(np.asarray(y)).all()
    assert (np.asarray(linear(jnp.zeros((2, 100)), q)) == 0).all()


def test_gradients_reach_the_input_of_a_plain_kernel():
    x, w, _ = operands()
    np.testing.assert_allclose(
        jax.grad(lambda x: linear(x, w).sum())(x), np.broadcast_to(w.sum(1), x.shape), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_inputs_divided_over_one_device_give_the_same(dtype, rtol):
    """Over several: eight_devices.py."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((100, 24)), jnp.float32)
    q = lorc(w, quantize_array(w, QuantSpec(group_size=32, constraint="m2")), rank=4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 100)), dtype)
    bias = jnp.ones(24, dtype)
    alone, divided = (jax.jit(linear)(x, kernel, bias) for kernel in (q, RowParallelKernel(q, make_mesh())))
    assert divided.dtype == dtype
    np.testing.assert_allclose(divided.astype(jnp.float32), alone.astype(jnp.float32), atol=rtol * jnp.abs(alone).max())


def test_one_token_alone_has_no_batch():
    w, x = jax.random.normal(jax.random.key(1), (32, 24)), jax.random.normal(jax.random.key(2), (32,))
    q = lorc(w, quantize_array(w, QuantSpec(constraint="m2", group_size=16)), rank=4)
    got = linear(x, q, jnp.ones(24))
    assert got.shape == (24,)
    np.testing.assert_array_equal(got, linear(x[None], q, jnp.ones(24))[0])


@pytest.mark.parametrize("activation", [E4M3, None])
def test_gradients_are_of_the_dequantized_weight(activation):
    w, x = jax.random.normal(jax.random.key(1), (32, 24)), jax.random.normal(jax.random.key(2), (5, 32))
    q = quantize_array(w, QuantSpec(constraint="m2", group_size=16, activation=activation))
    pullback = lambda x: jax.vjp(lambda x: linear(x, q), x)[1](jnp.ones((5, 24)))[0]
    np.testing.assert_allclose(jax.jit(pullback)(x), jnp.ones((5, 24)) @ dequantize(q).T, rtol=1e-5, atol=1e-5)
    _, tangent = jax.jvp(lambda x: linear(x, q), (x,), (x,))
    np.testing.assert_allclose(tangent, x @ dequantize(q), rtol=1e-5, atol=1e-5)
    # scales are constants
    by_scale = jax.grad(lambda s: linear(x, dataclasses.replace(q, row_scale=s)).sum())(q.row_scale)
    assert not bool(by_scale.any())


def test_exponents_that_do_not_expand_exactly_are_refused():
    q = quantize_array(jnp.ones((32, 8)), QuantSpec(constraint="m2", group_size=16))
    with pytest.raises(FpqError, match="Exponents -20 to -20 are outside -8 to 6"):
        linear(jnp.ones((2, 32)), dataclasses.replace(q, exponents=q.exponents * 0 - 20))

"""Training around quantized parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mostly_full

import fpq_jax as fpq

SPEC = fpq.QuantSpec(constraint="m2", group_size=16)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _params(dtype="bfloat16"):
    w = _normal(1, 32, 24)
    with_factors = fpq.lorc(w, fpq.quantize_array(w, SPEC), rank=4, dtype=dtype)
    return {
        "a": with_factors,
        "b": fpq.quantize_array(w.T, SPEC),
        "bias": _normal(2, 24),
        "steps": jnp.int32(3),
        "f": jnp.tanh,
    }


@pytest.mark.parametrize("train", ["low_rank", "all"])
def test_what_is_parted_comes_together_again(train):
    params = _params()
    trained, rest = fpq.partition(params, train)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert len(jax.tree.leaves(trained)) == (2 if train == "low_rank" else 3)
    assert (trained["bias"] is None) == (train == "low_rank") and trained["b"] is None and rest["a"].low_rank is None
    back = fpq.combine(trained, rest)
    assert back["f"] is jnp.tanh and jax.tree.structure(back) == jax.tree.structure(params)
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        if wanted is not jnp.tanh:
            np.testing.assert_array_equal(got, wanted)


def test_nothing_to_train_is_an_error():
    for params in (_params("int8"), {"b": _params()["b"], "bias": jnp.ones(3)}):
        with pytest.raises(fpq.FpqError, match="There is nothing to train"):
            fpq.partition(params)
    with pytest.raises(fpq.FpqError, match="combine takes what is trained first"):
        fpq.combine(*fpq.partition(_params())[::-1])
    for how, weight in (("e4m3", jnp.ones((2, 2))), (SPEC, jnp.ones(4))):
        with pytest.raises(fpq.FpqError, match=r"how is 'e4m3'|has no inputs and outputs"):
            fpq.straight_through(weight, how)
    with pytest.raises(fpq.FpqError, match="train is 'everything'; it must be low_rank or all"):
        fpq.partition(_params(), "everything")


def test_an_optimizer_trains_factors_and_biases_but_no_codes():
    params, x = _params(), _normal(3, 64, 32)
    target = x @ (_normal(1, 32, 24) + 0.02 * _normal(5, 32, 24)) + 1
    apply = fpq.quantized(lambda p, x: x @ p["a"] + p["bias"])
    trained, rest = fpq.partition(params, "all")
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(trained, state):
        loss = lambda trained: jnp.mean((apply(fpq.combine(trained, {**rest, "f": None}), x) - target) ** 2)
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    state, values = optimizer.init(trained), []
    for _ in range(100):
        trained, state, value = step(trained, state)
        values.append(float(value))
    after = fpq.combine(trained, rest)
    assert values[-1] < 0.2 * values[0]
    np.testing.assert_array_equal(after["a"].codes, params["a"].codes)
    assert after["a"].low_rank.a.dtype == jnp.bfloat16 and bool((after["bias"] != params["bias"]).all())


@pytest.mark.parametrize(
    "how", mostly_full([fpq.E2M1, SPEC, fpq.E4M3, fpq.INT4, fpq.QuantSpec(group_size=8)], 2), ids=str
)
def test_rounding_that_gradients_pass_straight_through(how):
    w = 3 * _normal(1, 2, 32, 24)
    rounded = fpq.straight_through(w, how)
    if isinstance(how, fpq.QuantSpec):
        expected = jnp.stack([fpq.dequantize(fpq.quantize_array(one, how)) for one in w])
    else:
        expected = fpq.cast(w, how)
    np.testing.assert_allclose(rounded, expected, rtol=1e-6)
    assert bool((rounded != w).any())
    weight = _normal(2, *w.shape)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(weight * fpq.straight_through(w, how))))(w)
    np.testing.assert_array_equal(gradient, weight)
    f = lambda w: jnp.sum(fpq.straight_through(w, how) ** 3)
    second = jax.jvp(jax.grad(f), (w,), (weight,))[1]
    np.testing.assert_allclose(second, 6 * expected * weight, rtol=1e-4, atol=1e-4)
    half = fpq.straight_through(w.astype(jnp.bfloat16), how)
    assert half.dtype == jnp.bfloat16
    _, tangent = jax.jvp(lambda w: fpq.straight_through(w, how), (w,), (weight,))
    np.testing.assert_array_equal(tangent, weight)

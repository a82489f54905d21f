"""Scales, codes and low-rank correction together: each option lowers the error of outputs on inputs not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import QuantSpec, dequantize, hessian
from fpq_jax._algorithms.joint import quantize_jointly
from fpq_jax._algorithms.linear_recipe import LinearRecipe, Lorc
from fpq_jax._algorithms.lorc import weighted_low_rank
from fpq_jax._algorithms.metric import factorize

quantize = jax.jit(quantize_jointly, static_argnums=2)
SPEC = QuantSpec(group_size=32, constraint="m2")


def problem(seed=0, inputs=128, outputs=64):
    """A weight, and inputs [rows, in] to calibrate on and to test on: correlated, with a few large channels."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(inputs) + rng.standard_normal((inputs, 12)) @ rng.standard_normal((12, inputs)) / 6
    mixing[:, ::19] *= 6
    x = (rng.standard_normal((3000, inputs)) @ mixing).astype(np.float32)
    w = rng.standard_t(5, (inputs, outputs)).astype(np.float32)
    return w, x[:2000], x[2000:]


def held_out_error(recipe, seed=0):
    w, x, held = problem(seed)
    q = quantize(jnp.asarray(w), factorize(hessian(jnp.asarray(x)), 0.01, recipe.order), recipe)
    return np.linalg.norm(held @ (np.asarray(dequantize(q)) - w)) / np.linalg.norm(held @ w)


OPTIONS = {
    "order": {"order": "activation"},
    "scale_search": {"scale_search": True},
    "sweeps": {"sweeps": 2},
    "lorc": {"lorc": Lorc(rank=4, weighted=True)},
}


def recipe(*names):
    return LinearRecipe(spec=SPEC, **{key: value for name in names for key, value in OPTIONS[name].items()})


def mean_error(one):
    return np.mean([held_out_error(one, seed) for seed in range(3)])


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_lowers_the_error_alone_and_beside_the_others(option):
    plain, alone = mean_error(recipe()), mean_error(recipe(option))
    without, every = mean_error(recipe(*(name for name in OPTIONS if name != option))), mean_error(recipe(*OPTIONS))
    assert alone < 0.99 * plain
    assert every < 0.995 * without


def test_finding_codes_and_correction_in_turn_lowers_the_error_further():
    of = lambda rounds: mean_error(LinearRecipe(spec=SPEC, lorc=Lorc(rank=8, weighted=True, rounds=rounds)))
    assert of(2) < 0.995 * of(0)


def test_the_weighted_correction_is_the_best_of_its_rank_for_the_outputs():
    w, x, _ = problem(1, inputs=96, outputs=40)
    metric = factorize(hessian(jnp.asarray(x)), 0.01, "activation")
    low = weighted_low_rank(jnp.asarray(w), metric, 6, "bfloat16", 0)
    h = np.asarray(metric.hessian, np.float64)
    values, vectors = np.linalg.eigh(h)
    root = (vectors * np.sqrt(values)) @ vectors.T
    singular = np.linalg.svd(root @ w.astype(np.float64), compute_uv=False)
    d = w - np.asarray(low.product(), np.float64)
    assert np.sqrt(np.sum(d * (h @ d))) == pytest.approx(np.sqrt((singular[6:] ** 2).sum()), rel=0.01)
    a, b = np.asarray(low.a, np.float32), np.asarray(low.b, np.float32)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=0.02)


def test_inputs_never_seen_have_no_weight():
    w, x, _ = problem(2)
    x[:, 7] = 0
    recipe = LinearRecipe(spec=SPEC, order="activation", lorc=Lorc(rank=4, weighted=True))
    q = quantize(jnp.asarray(w), factorize(hessian(jnp.asarray(x)), 0.01, "activation"), recipe)
    assert (np.asarray(dequantize(q))[7] == 0).all()

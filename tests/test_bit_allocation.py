"""What candidates cost against the errors of the weights that they become, and the choice against all choices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import fpq_jax as fpq
from fpq_jax._algorithms.bit_allocation import RANKS, allocate, candidates, expected_losses, stored_bits
from fpq_jax._algorithms.fisher import fisher_of
from fpq_jax._algorithms.linear_recipe import LinearRecipe, Lorc
from fpq_jax._algorithms.quantize_linears import quantize_kernel
from fpq_jax._algorithms.statistics import InputStats
from fpq_jax._numerics.qtensor import dequantize

LORC = Lorc(rank=8, weighted=True)


def recipe(group=64, lorc=LORC):
    spec = fpq.QuantSpec(group_size=group, constraint="m2")
    return LinearRecipe(spec=spec, order="activation", fisher=0.5, lorc=lorc)


def example(inputs=96, outputs=56, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, inputs)) * np.exp(rng.standard_normal(inputs))
    gradient = rng.standard_normal((inputs, outputs)) * np.exp(rng.standard_normal((inputs, 1)))
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    seen = InputStats(jnp.asarray((x.T @ x).astype(np.float32)), jnp.int32(400))
    return jnp.asarray(w), seen, fisher_of(jnp.asarray(gradient, jnp.float32), 100)


def test_candidates_are_groups_and_ranks_of_the_format_and_fp8():
    found = candidates(recipe())
    names = [(str(r.spec.format), r.spec.group_size, r.lorc and r.lorc.rank) for r in found]
    assert names == [
        *(("e2m1", group, rank or None) for group in (64, 32) for rank in RANKS),
        ("e4m3", "channel", None),
    ]
    assert all(one.fisher == 0.5 and one.order == "activation" for one in found)
    assert [str(r.spec.format) for r in candidates(recipe(group="channel", lorc=None))] == ["e2m1", "e4m3"]


@pytest.mark.full
def test_a_candidate_costs_what_the_weight_that_it_becomes_costs():
    w, seen, fisher = example()
    losses = expected_losses(w, seen, fisher, recipe(), fpq.make_mesh(), 0)
    a, b = (np.asarray(m, np.float64) for m in fisher[:2])
    for one, loss in zip(candidates(recipe()), losses, strict=True):
        q = quantize_kernel([w], seen, one, fpq.make_mesh(), 0, fisher).q
        error = np.asarray(dequantize(q), np.float64) - np.asarray(w, np.float64)
        exact = 0.5 * (b * (error * (a @ error)).sum(axis=0)).sum() / np.trace(a) / 100
        np.testing.assert_allclose(loss, exact, rtol=1e-4)
    of_ranks = np.reshape(losses[:-1], (2, len(RANKS)))
    assert (np.diff(of_ranks, axis=1) < 0).all() and losses[-1] < 0.1 * of_ranks[:, 0].min()


def test_the_bits_are_those_of_the_tensor():
    w, seen, fisher = example()
    for one in (*candidates(recipe())[:2], candidates(recipe())[-1]):
        assert stored_bits(w.shape, one) == 8 * quantize_kernel([w], seen, one, fpq.make_mesh(), 0, fisher).q.nbytes


@pytest.mark.parametrize("most", [40, 55, 71, 200])
def test_the_choice_is_near_the_best_of_all_that_fit(most):
    rng = np.random.default_rng(most)
    bits = {f"w{i}": sorted(rng.integers(5, 30, 4).tolist()) for i in range(5)}
    losses = {name: np.sort(rng.random(4) * 10.0 ** rng.integers(-3, 0))[::-1].tolist() for name in bits}
    every = list(itertools.product(range(4), repeat=5))
    takes = lambda choice: sum(bits[name][c] for name, c in zip(bits, choice, strict=True))
    costs = lambda choice: sum(losses[name][c] for name, c in zip(bits, choice, strict=True))
    fitting = [choice for choice in every if takes(choice) <= most]
    if not fitting:
        with pytest.raises(fpq.FpqError, match=f"{most} are allowed"):
            allocate(losses, bits, most)
        return
    chosen = list(allocate(losses, bits, most).values())
    assert takes(chosen) <= most
    # none is better with fewer bits by more than the largest step of one weight, which the relaxation may lose
    step = max(int(np.diff(of).max()) for of in bits.values())
    assert costs(chosen) <= min((costs(choice) for choice in fitting if takes(choice) <= most - step), default=np.inf)
    if most == 200:
        assert chosen == [3] * 5


def test_many_weights_take_a_moment():
    """As many as a model of 70 billion has; no choice is better by more than 0.5 %."""
    rng = np.random.default_rng(0)
    ladder = np.array([4.1, 4.2, 4.3, 4.5, 4.9, 8.0])
    size = rng.choice([2**20, 2**24], 560)
    bits = {f"w{i}": (ladder * size[i]).astype(int).tolist() for i in range(560)}
    losses = {name: (np.exp(3 * rng.standard_normal()) * 4.0**-ladder).tolist() for name in bits}
    chosen = allocate(losses, bits, 4.5 * size.sum())
    used = sum(bits[name][c] for name, c in chosen.items())
    assert 4.49 * size.sum() < used <= 4.5 * size.sum() and len(set(chosen.values())) > 3
    dual = lambda price: sum(min(np.asarray(losses[n]) + price * np.asarray(bits[n])) for n in bits) - price * used
    bound = max(map(dual, np.geomspace(1e-14, 1e-6, 2000)))
    assert sum(losses[name][c] for name, c in chosen.items()) < 1.005 * bound


def test_unseen_weights_cost_nothing():
    w, _, _ = example()
    nothing = fisher_of(jnp.zeros(w.shape), 0)
    seen = InputStats(jnp.zeros((96, 96)), jnp.int32(0))
    losses = expected_losses(w, seen, nothing, recipe(lorc=None), fpq.make_mesh(), 0)
    np.testing.assert_array_equal(losses, 0)

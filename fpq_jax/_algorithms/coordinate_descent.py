"""Coordinate descent on codes: one weight after the other takes the level that is best while all others stay.

GPTQ rounds each input once, looking only ahead. With D = Q - V the error of the rounded weight Q against its target V,
the loss tr(D^T H D) as a function of one weight q_i of an output is a parabola with its minimum at q_i - P_i / H_ii,
where P = H D; the best level is the one nearest to it. A sweep goes over all inputs; the loss never rises. (Known as
QuantEase, Behdin et al., 2023, arXiv 2309.01885, and CDQuant, Nair and Suggala, 2024, arXiv 2406.17542.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul, unrolled
from fpq_jax._numerics.formats import Format
from fpq_jax._numerics.scales import Scale

_BLOCK = 64  # inputs whose changes reach the others by one matrix product


def descend(
    values: Float[Array, "in out"],
    target: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    scales: Scale,
    fmt: Format,
    sweeps: int,
) -> Float[Array, "in out"]:
    """Values of the format after so many sweeps. ``scales``: of each input, [in, out]. The Hessian's diagonal is
    positive."""
    in_features = len(values)
    padding = -in_features % _BLOCK
    fill = lambda m, with_=0: jnp.pad(m, ((0, padding), (0, 0)), constant_values=with_)
    hessian = jnp.pad(hessian, ((0, padding), (0, padding)))
    diagonal = jnp.where(jnp.arange(len(hessian)) < in_features, jnp.diagonal(hessian), 1.0)
    scales = Scale(fill(scales.scale, 1), fill(scales.zero), None)
    weights = scales.numbers(fill(values), fmt)
    gradient = matmul(hessian, weights - fill(target))

    def block(b, state):
        weights, gradient = state
        start = b * _BLOCK
        rows = lambda m: jax.lax.dynamic_slice_in_dim(m, start, _BLOCK)
        columns = jax.lax.dynamic_slice_in_dim(hessian, start, _BLOCK, axis=1)
        own, scale, curvature = rows(columns), jax.tree.map(rows, scales), rows(diagonal)

        def one(j, state):
            w, g = state
            at = jax.tree.map(lambda m: m[j], scale)
            best = at.numbers(at.values(w[j] - g[j] / curvature[j], fmt), fmt)
            return w.at[j].set(best), g + own[:, j, None] * (best - w[j])

        before = rows(weights)
        after, _ = jax.lax.fori_loop(0, _BLOCK, one, (before, rows(gradient)), unroll=unrolled())
        weights = jax.lax.dynamic_update_slice_in_dim(weights, after, start, 0)
        return weights, gradient + matmul(columns, after - before)

    def sweep(_, state):
        return jax.lax.fori_loop(0, len(hessian) // _BLOCK, block, state)

    weights, _ = jax.lax.fori_loop(0, sweeps, sweep, (weights, gradient))
    return scales.values(weights, fmt)[:in_features]

"""Scales that lose least: shrunken ranges and lower exponents, compared by the weighted squared error of rounding.

The largest scale, which clips nothing, wastes the codes near the end of the format where few weights are large. For
each scale that may be chosen freely (a group's, or under M2 a row's reference) the candidates are 2^(-j/8) of the
largest, j = 0 .. 7; under M1 and M2 each group then has the exponent that clips nothing, or the one below it. The
weight of an input is what an error there costs while all later inputs make up for it as far as they can, as GPTQ lets
them: 1 / U_ii^2 with the upper Cholesky factor U of the inverse Hessian, which is R_ii^2 with H = R R^T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._numerics.scales import (
    Scale,
    ceil_log2_ratio,
    exponent_window,
    grouped,
    power_of_two,
    range_scale,
    row_reference,
    top_exponent,
)
from fpq_jax._numerics.spec import QuantSpec

_STEPS = 8  # shrunken candidates, of an octave together


def search_scales(w: Float[Array, "in out"], importance: Float[Array, " in"], spec: QuantSpec) -> tuple[Scale, Scale]:
    """(scale of each group [groups, out], reference of each row), as ``weight_scales`` gives them, that round ``w``
    with the least error, the squares weighted by the ``importance`` of the inputs."""
    groups, weights = grouped(w, importance, spec)
    steps = 1 if spec.constraint == "m1" else _STEPS  # M1's references are powers of two
    shrinks = 2.0 ** (-jnp.arange(steps, dtype=jnp.float32) / _STEPS)
    reference = row_reference(w, spec)
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)  # zeros of the filling widen no range
    if spec.group_size == "tensor":
        low, high = (jnp.full_like(m, f(m)) for m, f in ((low, jnp.min), (high, jnp.max)))

    def lost(scale: Scale) -> Float[Array, "groups out"]:
        each = jax.tree.map(lambda m: m[:, None], scale)
        rounded = each.numbers(each.values(groups, spec.format), spec.format)
        return jnp.sum(weights[:, :, None] * (groups - rounded) ** 2, axis=1)

    def candidate(shrink: Array) -> tuple[Float[Array, "groups out"], Scale]:
        free = range_scale(low * shrink, high * shrink, spec.format)
        if spec.constraint is None:
            scale = free._replace(exponent=jnp.zeros(low.shape, jnp.int8))
            return lost(scale), scale
        row = reference.scale * shrink
        smallest, largest = exponent_window(spec, len(w))
        whole = range_scale(low, high, spec.format).scale
        up = jnp.clip(ceil_log2_ratio(whole, jnp.broadcast_to(row, whole.shape)), smallest, largest)
        up = jnp.where((low == 0) & (high == 0), top_exponent(spec, len(w)), up)
        of = lambda e: Scale(row * power_of_two(e), free.zero, e.astype(jnp.int8))
        upper, lower = of(up), of(jnp.maximum(up - 1, smallest))
        errors = lost(upper), lost(lower)
        better = errors[1] < errors[0]
        return jnp.minimum(*errors), jax.tree.map(lambda u, v: jnp.where(better, v, u), upper, lower)

    errors, scales = jax.lax.map(candidate, shrinks)
    best = jnp.argmin(_of_one_choice(errors, spec), axis=0)  # the first, the largest, of equal ones
    chosen = jax.tree.map(lambda m: jnp.take_along_axis(m, best[None], axis=0)[0], scales)
    if spec.constraint is None:
        return chosen, reference
    return chosen, reference._replace(scale=reference.scale * shrinks[best[0]])


def _of_one_choice(errors: Float[Array, "steps groups out"], spec: QuantSpec) -> Float[Array, "steps groups out"]:
    """The errors added up over what has one candidate in common."""
    if spec.group_size == "tensor":
        return jnp.broadcast_to(jnp.sum(errors, axis=(1, 2), keepdims=True), errors.shape)
    if spec.constraint is None:
        return errors
    of_rows = jnp.sum(errors, axis=1, keepdims=True)
    if spec.compute_rows > 1:
        out = errors.shape[2]
        blocks = jnp.arange(out) // spec.compute_rows
        of_blocks = jax.vmap(lambda row: jnp.zeros(out).at[blocks].add(row)[blocks])
        of_rows = of_blocks(of_rows[:, 0])[:, None]
    return jnp.broadcast_to(of_rows, errors.shape)

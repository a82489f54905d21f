"""Scales: absmax, ranges with a zero point, and the power-of-two constraints M1 and M2 (ZeroQuant-FP, section 3).

Lingo: S, the free scale of a group: absmax / format max; for asymmetric integers (max - min) / format max, where the
range contains 0, and the level of x is round((x - Z) / S) (ZeroQuant-V2) with Z = -S z for the integer zero point
z = round(-min / S), so that 0 is a level, as in the code of the paper's team. R, the reference of an output row;
under a constraint every scale of the row is R * 2**e with an integer e, and e stays where the format times 2**e is
exact in float8_e4m3fn.
"up" takes the least such scale that is not below S. For M2 the reference is the row's (or compute group's) largest S
times a power of two, which makes that scale Smax / 2**floor(log2(Smax / S)), as the paper has it; for M1 R is itself a
power of two, which makes it 2**ceil(log2(S)).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fpq_jax._numerics.formats import Format, cast
from fpq_jax._numerics.spec import QuantSpec

# Binades above the row's first Smax that a group may grow to while GPTQ updates the weights.
_HEADROOM = 2
_SEARCHED = 15  # exponents tried by "search": as many as fit a row exactly
_SMALLEST_FREE = 2.0**-126  # smallest normal float32: below it hardware flushes to zero
_SMALLEST_REFERENCE = 2.0**-100  # leaves room for R * 2**e and for the token's scale above the smallest normal


def free_scale(absmax: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """absmax / max, 1 where absmax is zero, never below the smallest normal float32; NaN for NaN."""
    # a product, since XLA makes one of a division by a constant, and eager and jitted scales must be equal
    scale = jnp.maximum(absmax.astype(jnp.float32) * np.float32(1 / fmt.max), _SMALLEST_FREE)
    return jnp.where(absmax == 0, 1.0, scale)


class Scale(NamedTuple):
    """What turns a format's values into numbers: (value - zero) * scale. ``exponent`` is what a constraint stores."""

    scale: Any
    zero: Any
    exponent: Any = None

    def values(self, x: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
        """The format's nearest values to the numbers ``x``."""
        return cast(self.divided(x, fmt), fmt)

    def divided(self, x: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
        """What is to be rounded to the format's values."""
        quotient = x / self.scale
        # rounded before the zero point is added, which would cost digits
        return jnp.round(quotient) + self.zero if fmt.asymmetric else quotient

    def numbers(self, values: Float[Array, "..."], fmt: Format) -> Float[Array, "..."]:
        """The inverse of ``values``."""
        return (values - self.zero if fmt.asymmetric else values) * self.scale


def range_scale(low: Float[Array, "..."], high: Float[Array, "..."], fmt: Format) -> Scale:
    """The free scale of values from ``low`` to ``high``; the zero point is 0 for symmetric formats."""
    if not fmt.asymmetric:
        scale = free_scale(jnp.maximum(jnp.abs(low), jnp.abs(high)), fmt)
        return Scale(scale, jnp.zeros_like(scale))
    low, high = jnp.minimum(low.astype(jnp.float32), 0), jnp.maximum(high.astype(jnp.float32), 0)
    # halved, since the whole range may be beyond float32
    scale = jnp.where(high == low, 1.0, 2 * free_scale(high / 2 - low / 2, fmt))
    return Scale(scale, jnp.clip(jnp.round(-low / scale), 0, fmt.max))


def row_reference(w: Float[Array, "in out"], spec: QuantSpec) -> Scale:
    """R of each output row, from the weights as given (free scales: the row's own, the tensor's for "tensor")."""
    fmt, in_features = spec.format, w.shape[0]
    low, high = jnp.min(w, axis=0), jnp.max(w, axis=0)
    if spec.group_size == "tensor":
        low, high = (jnp.broadcast_to(m, low.shape) for m in (jnp.min(low), jnp.max(high)))
    if spec.compute_rows > 1:
        low, high = (_over_rows(m, f, spec.compute_rows) for m, f in ((low, jnp.min), (high, jnp.max)))
    free = range_scale(low, high, fmt)
    if spec.constraint is None:
        return free
    largest = free.scale
    if spec.constraint == "m1":
        largest = power_of_two(ceil_log2_ratio(largest, jnp.ones_like(largest)))
    return free._replace(scale=jnp.maximum(largest * 2.0 ** -top_exponent(spec, in_features), _SMALLEST_REFERENCE))


def _over_rows(values: Float[Array, " out"], reduce: Any, rows: int) -> Float[Array, " out"]:
    """Each block of ``rows`` values replaced by their reduction; the last block may be shorter."""
    rows = min(rows, len(values))
    blocks = -(-len(values) // rows)
    padded = jnp.pad(values, (0, blocks * rows - len(values)), mode="edge").reshape(blocks, rows)
    return jnp.repeat(reduce(padded, axis=1), rows)[: len(values)]


def group_scale(
    w: Float[Array, "g out"],
    reference: Scale,
    weight: Float[Array, " g"],
    spec: QuantSpec,
    in_features: int,
) -> Scale:
    """Scale, zero point and exponent of one group for each output, from its weights as they are now.

    ``reference`` is what ``row_reference`` gave; ``weight`` the importance of each input in "search" (the Hessian's
    diagonal), zero for inputs that are padding. The exponent is 0 for free scales, the zero point for symmetric
    formats.
    """
    no_exponent = jnp.zeros(reference.scale.shape, jnp.int8)
    if spec.group_size == "tensor":
        return reference._replace(exponent=no_exponent)
    real = weight[:, None] > 0
    low, high = jnp.min(jnp.where(real, w, jnp.inf), axis=0), jnp.max(jnp.where(real, w, -jnp.inf), axis=0)
    low, high = (jnp.where(low > high, 0.0, m) for m in (low, high))  # a group of padding only
    free = range_scale(low, high, spec.format)
    if spec.constraint is None:
        return free._replace(exponent=no_exponent)
    smallest, largest = exponent_window(spec, in_features)
    up = jnp.clip(ceil_log2_ratio(free.scale, reference.scale), smallest, largest)
    if spec.exponent_rounding == "nearest":
        exponent = jnp.clip(_nearest_log2_ratio(free.scale, reference.scale), smallest, largest)
    elif spec.exponent_rounding == "search":
        exponent = _search(w, reference.scale, weight, up, smallest, spec.format)
    else:
        exponent = up
    # an all-zero group has no scale of its own: it takes its row's largest
    exponent = jnp.where((low == 0) & (high == 0), top_exponent(spec, in_features), exponent)
    return Scale(reference.scale * power_of_two(exponent), free.zero, exponent.astype(jnp.int8))


def weight_scales(w: Float[Array, "in out"], importance: Float[Array, " in"], spec: QuantSpec) -> tuple[Scale, Scale]:
    """(scale of each group [groups, out], reference of each row) of a weight as it is. ``importance``: of each input,
    positive."""
    reference = row_reference(w, spec)
    of_group = lambda g, weight: group_scale(g, reference, weight, spec, w.shape[0])
    return jax.vmap(of_group)(*grouped(w, importance, spec)), reference


def grouped(
    w: Float[Array, "in out"], importance: Float[Array, " in"], spec: QuantSpec
) -> tuple[Float[Array, "groups g out"], Float[Array, "groups g"]]:
    """A weight by groups, and the importance of each input; the last group is filled up with zeros."""
    groups, length = spec.num_groups(len(w)), spec.group_length(len(w))
    padding = groups * length - len(w)
    return (
        jnp.pad(w, ((0, padding), (0, 0))).reshape(groups, length, -1),
        jnp.pad(importance, (0, padding)).reshape(groups, length),
    )


def of_inputs(scales: Scale, spec: QuantSpec, in_features: int) -> Scale:
    """Scales [groups, out] as those of each input, [in, out]."""
    if len(scales.scale) == 1:
        return jax.tree.map(lambda m: jnp.broadcast_to(m, (in_features, m.shape[1])), scales)
    return jax.tree.map(lambda m: jnp.repeat(m, spec.group_length(in_features), axis=0)[:in_features], scales)


def exponent_window(spec: QuantSpec, in_features: int) -> tuple[int, int]:
    """Allowed exponents. A row of one group has none to store, so only float32's range limits it."""
    return spec.format.exact_shifts if spec.num_groups(in_features) > 1 else (-24, 24)


def top_exponent(spec: QuantSpec, in_features: int) -> int:
    """Exponent of the row's Smax, below the window's end so that a group can still grow."""
    return exponent_window(spec, in_features)[1] - _HEADROOM if spec.num_groups(in_features) > 1 else 0


def _search(
    w: Float[Array, "g out"],
    reference: Float[Array, " out"],
    weight: Float[Array, " g"],
    up: Array,
    low: int,
    fmt: Format,
) -> Int[Array, " out"]:
    """The exponent with the least weighted squared error, ties to the larger.

    Above "up" every grid point within the weights' range is one of the finer grid too, so only lower ones can win.
    """

    def step(i, best):
        best_error, best_exponent = best
        exponent = jnp.maximum(up - i, low)
        scale = reference * power_of_two(exponent)
        error = jnp.sum(weight[:, None] * (w - cast(w / scale, fmt) * scale) ** 2, axis=0)
        better = error < best_error
        return jnp.where(better, error, best_error), jnp.where(better, exponent, best_exponent)

    return jax.lax.fori_loop(0, _SEARCHED, step, (jnp.full(up.shape, jnp.inf), up))[1]


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2**exponent, exactly, for exponents from -126 to 127."""
    field = (exponent.astype(jnp.int32) + 127) << 23
    return jax.lax.bitcast_convert_type(field, jnp.float32)


def _frexp(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """Mantissa in [1, 2) and exponent of a positive normal float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32), (bits >> 23) - 127


def ceil_log2_ratio(s: Float[Array, "..."], r: Float[Array, "..."]) -> Int[Array, "..."]:
    """ceil(log2(s / r)), exact: no division is rounded."""
    (ms, es), (mr, er) = _frexp(s), _frexp(r)
    return es - er + (ms > mr)


def _nearest_log2_ratio(s: Float[Array, "..."], r: Float[Array, "..."]) -> Int[Array, "..."]:
    """log2(s / r) to the nearest integer."""
    (ms, es), (mr, er) = _frexp(s), _frexp(r)
    ratio = ms / mr
    return es - er + (ratio > 2.0**0.5) - (ratio < 2.0**-0.5)

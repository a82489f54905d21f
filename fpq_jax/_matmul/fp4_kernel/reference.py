"""The kernel's arithmetic in plain JAX, unit by unit as the kernel's runs have them: what it must give."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt32

from fpq_jax._matmul.fp4_kernel.schedule import STEP, Schedule
from fpq_jax._numerics.scales import power_of_two

_LOW, _HIGH = np.uint32(0x77777777), np.uint32(0x80808080)


def partial_sums(
    x: Shaped[Array, "m k"],
    words: UInt32[Array, "tiles lines 128"],
    group_scale: Shaped[Array, "groups outs"] | None,
    table: np.ndarray,
    s: Schedule,
) -> Float[Array, "slots rows outs"]:
    """The partial sums of x [m, k] (float8_e4m3fn) and a weight of ``words``, whose codes are ``table``'s numbers; NaN
    where a tile has fewer than the most."""
    outs = 64 * len(words)
    length = s.steps * STEP
    w = _values(words, table)
    w = jnp.pad(w, ((0, 0), (0, length - w.shape[1])))
    x = jnp.pad(x.astype(jnp.float32), ((0, s.rows - s.m), (0, length - x.shape[1])))
    parts = STEP // s.part
    tile = _tile_of(replace(s, m=s.rows), outs)

    def step(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, slots = state
        unit = tile * s.steps + k
        total = jnp.where((unit % s.run == 0) | (k == 0), 0.0, total)
        for i in range(parts):
            start = k * STEP + i * s.part
            cut = lambda a, start=start: jax.lax.dynamic_slice_in_dim(a, start, s.part, axis=1)
            product = jax.lax.dot_general(cut(x), cut(w), (((1,), (1,)), ((), ())), precision="highest")
            total = total + product * _scale(group_scale, start, s)
        ends = (unit % s.run == s.run - 1) | (k == s.steps - 1)
        slot = unit // s.run - s.first_run(tile)
        here = ends & (slot == jnp.arange(s.slots)[:, None, None])
        return total, jnp.where(here, total, slots)

    start = jnp.zeros((s.rows, outs), jnp.float32), jnp.full((s.slots, s.rows, outs), jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, s.steps, step, start)[1]


def added_up(partial: Float[Array, "slots rows outs"], s: Schedule) -> Float[Array, "m n"]:
    """The product: the slots that a tile has, one after the other."""
    tile = _tile_of(s, s.n)
    used = s.last_run(tile) - s.first_run(tile)
    y = partial[0, : s.m, : s.n]
    for slot in range(1, s.slots):
        y = y + jnp.where(slot <= used, partial[slot, : s.m, : s.n], 0.0)
    return y


def _tile_of(s: Schedule, outs: int) -> Int[Array, "tokens outs"]:
    """The number of the tile that each result is in; one row for all tokens where they are one tile."""
    columns = jnp.arange(outs, dtype=jnp.int32)[None, :] // s.outputs
    if s.token_tiles == 1:
        return columns
    return (jnp.arange(s.m, dtype=jnp.int32)[:, None] // s.tokens) * s.output_tiles + columns


def _scale(group_scale: Array | None, start: Array, s: Schedule) -> Array | float:
    """Of the inputs from ``start``, for each output."""
    if group_scale is None or s.group is None:
        return 1.0
    found = group_scale[jnp.minimum(start // s.group, len(group_scale) - 1)]
    return power_of_two(found) if found.dtype == jnp.int8 else found


def _values(words: UInt32[Array, "tiles lines 128"], table: np.ndarray) -> Float[Array, "outs ins"]:
    """The numbers of the words, by the kernel's own steps: masks and table."""
    tiles, rows, _ = words.shape
    nibbles = words & _LOW
    highest = jnp.stack([words & _HIGH, (words << 4) & _HIGH], axis=-1)
    halves = jnp.stack([nibbles, nibbles >> 16], axis=-1)  # prmt takes the nibbles of the low 16 bits
    byte = 8 * np.arange(4, dtype=np.uint32)
    index = ((halves[..., None] >> (byte // 2)) & 7) | (((highest[..., None] >> byte) & 0x80) >> 4)
    codes = jnp.asarray(table)[index].reshape(tiles, rows // 4, 4, 8, 4, 4, 2, 4)  # tile, unit, w, r, c, i, h, j
    codes = codes.transpose(0, 2, 6, 3, 1, 5, 4, 7).reshape(64 * tiles, 16 * rows)
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)

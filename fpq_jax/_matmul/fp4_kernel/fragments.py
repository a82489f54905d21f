"""4-bit codes in the order in which the kernel's threads want them, and back; nothing is lost.

The tensor core's instruction (wgmma with 8-bit factors, PTX ISA 9.7.15) takes 64 outputs by 32 inputs of the weight
from the registers of 128 threads: thread 32 w + 4 r + c holds, of output 16 w + 8 h + r (h: 0 or 1), the inputs
16 i + 4 c + j (j: 0 to 3; i: 0 or 1), four to a register. A block here is 64 outputs by 64 inputs; of it each thread
has four words of eight codes, 16 bytes that it loads at once, word i for inputs 16 i + 4 c + j.

Of a code the low three bits are in nibble 4 h + j of its word, which is what PTX's ``prmt`` takes to choose among the
eight bytes of a table; the fourth bit of these nibbles must be 0 there. The highest bits of the codes are in the fourth
bits, where a mask (h = 1: a shift by 4 and a mask) leaves them at the top of the byte that they belong to, as the signs
that they are in E2M1 and E3M0: bit 8 j + 7 for h = 0, 8 j + 3 for h = 1. Seven instructions make eight E4M3 numbers
(eleven of INT4's, where the highest bit chooses between two tables).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.schedule import STEP
from fpq_jax._numerics.formats import E4M3, Format, pack, unpack
from fpq_jax._numerics.qtensor import Axes, LowRank, QTensor
from fpq_jax._numerics.spec import QuantSpec

BLOCK = 64  # outputs, and inputs, of a block of codes
_LEAST_GROUP = 32  # inputs of one instruction
_LOW_SHIFT = np.arange(8, dtype=np.uint32).reshape(2, 4) * 4  # [h, j]
_HIGH_SHIFT = 8 * np.arange(4, dtype=np.uint32) + np.array([[7], [3]], np.uint32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fragments:
    """A 4-bit weight of logical shape [in, out] as the kernel wants it; see QTensor for what the names mean.

    words: uint32 [ceil(out / 64), 4 * ceil(in / 64), 128], blocks of 512 words; zeros where there is no weight. Stack
        axes are in front, as in a QTensor.
    group_scale: [groups, 64 * ceil(out / 64)], int8 powers of two (M1, M2) or float32; None for one scale a row. Groups
        that neither divide a step of the kernel nor are divided by it are here as several.
    """

    words: Any
    group_scale: Any = None
    row_scale: Any = None
    input_scale: Any = None
    low_rank: LowRank | None = None
    spec: QuantSpec = field(kw_only=True, metadata={"static": True})
    shape: tuple[int, int] = field(kw_only=True, metadata={"static": True})
    axes: Axes | None = field(kw_only=True, default=None, metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.words.shape[:-3])

    @property
    def input_zero(self) -> None:
        """FP8 activations have no zero point."""
        return None


def takes(q: QTensor) -> bool:
    """Whether the kernel is for weights such as ``q``: symmetric 4-bit codes, activations in E4M3."""
    return q.spec.format.packed and q.spec.format.expands and q.spec.activation is E4M3


def group_length(spec: QuantSpec, in_features: int) -> int | None:
    """Inputs that the kernel multiplies between two scales; None where a row has one scale."""
    if spec.num_groups(in_features) == 1:
        return None
    length = spec.group_length(in_features)
    return length if STEP % length == 0 or length % STEP == 0 else int(np.gcd(length, STEP))


def fragments(q: QTensor) -> Fragments:
    """``q`` as the kernel wants it; FpqError for groups that it cannot take. ``takes(q)`` must hold."""
    in_features, out_features = q.shape
    length = group_length(q.spec, in_features)
    if length is not None and length < _LEAST_GROUP:
        raise FpqError(
            f"The kernel takes groups of a multiple of {_LEAST_GROUP} inputs, not of {q.spec.group_size}; use "
            "weights fp8 or packed."
        )
    scale = q.group_scale if q.exponents is None else q.exponents
    if scale is not None and length is not None:
        scale = jnp.repeat(scale.T, q.spec.group_length(in_features) // length, axis=0)[: -(-in_features // length)]
        scale = jnp.pad(scale, ((0, 0), (0, -out_features % BLOCK)))
    return Fragments(
        words=_words(unpack(q.codes, in_features)),
        group_scale=scale,
        row_scale=q.row_scale,
        input_scale=q.input_scale,
        low_rank=q.low_rank,
        spec=q.spec,
        shape=q.shape,
        axes=q.axes,
    )


def of_fragments(f: Fragments | QTensor) -> QTensor:
    """The QTensor that ``f`` was made of, or is."""
    if isinstance(f, QTensor):
        return f
    if f.stack:
        return jax.vmap(of_fragments)(f)
    in_features, out_features = f.shape
    names: dict[str, Any] = {}
    length = group_length(f.spec, in_features)
    if f.group_scale is not None and length is not None:
        scale = f.group_scale[:: f.spec.group_length(in_features) // length, :out_features].T
        names["exponents" if f.spec.constraint else "group_scale"] = scale
    return QTensor(
        codes=pack(_codes(f.words)[:out_features, :in_features]),
        row_scale=f.row_scale,
        input_scale=f.input_scale,
        low_rank=f.low_rank,
        spec=f.spec,
        shape=f.shape,
        axes=f.axes,
        **names,
    )


def table(fmt: Format) -> np.ndarray:
    """The number of each code as a byte of float8_e4m3fn; uint8 [16]."""
    assert fmt.table is not None
    return fmt.table.astype(jnp.float8_e4m3fn).view(np.uint8)


# eight codes to a word are eight times their size before they are one: not an array at a time
@jax.jit
def _words(codes: UInt8[Array, "out in"]) -> UInt32[Array, "tiles lines 128"]:
    codes = jnp.pad(codes, [(0, -size % BLOCK) for size in codes.shape])
    tiles, units = (size // BLOCK for size in codes.shape)
    # output: tile, w, h, r; input: unit, i, c, j
    apart = codes.reshape(tiles, 4, 2, 8, units, 4, 4, 4).transpose(0, 4, 1, 3, 6, 5, 2, 7).astype(jnp.uint32)
    bits = ((apart & 7) << _LOW_SHIFT) | ((apart >> 3) << _HIGH_SHIFT)
    words = jax.lax.reduce(bits, np.uint32(0), jax.lax.bitwise_or, (6, 7))
    return words.reshape(tiles, 4 * units, 128)


def _codes(words: UInt32[Array, "tiles lines 128"]) -> UInt8[Array, "outs ins"]:
    """The inverse of ``_words``, padded to whole blocks."""
    tiles, rows, _ = words.shape
    apart = words.reshape(tiles, rows // 4, 4, 8, 4, 4)[..., None, None]  # tile, unit, w, r, c, i, h, j
    codes = ((apart >> _LOW_SHIFT) & 7) | (((apart >> _HIGH_SHIFT) & 1) << 3)
    return codes.astype(jnp.uint8).transpose(0, 2, 6, 3, 1, 5, 4, 7).reshape(tiles * BLOCK, rows // 4 * BLOCK)

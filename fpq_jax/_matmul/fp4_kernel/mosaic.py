"""The kernel, in Pallas for the Mosaic GPU backend.

A block of threads has a warpgroup that only loads, by TMA, and warpgroups that multiply, each for 64 outputs and all
tokens of a tile. A step of 256 inputs: the weight's words, the tokens' codes and the groups' scales come into shared
memory; a thread loads 16 bytes of words, makes 32 E4M3 numbers of them in its registers (see ``fragments``), and the
tensor core multiplies these with the tokens in shared memory. The weight is the instruction's first factor, since that
is the one that may come from registers; so tokens are its columns, 8 to 128 of them. Each group of inputs is summed up
on its own, then scaled and added in float32: no exponent needs to fit FP8, free scales are as good as powers of two,
and the tensor core's short accumulator (14 bits; DeepSeek-V3, arXiv 2412.19437, section 3.3.2) never holds more than
256 products. Blocks of inputs or tokens beyond the arrays are zeros, which TMA fills in.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Shaped, UInt32

from fpq_jax._matmul.fp4_kernel.schedule import STEP, Schedule

_SWIZZLE = 128  # bytes, at most, of a token's codes that are swizzled together
_LOADING_REGISTERS = 40
_SCALES = plgpu.Layout.WGMMA.reduce(1)  # one for each output of a warpgroup


def partial_sums(
    x: Shaped[Array, "m k"],
    words: UInt32[Array, "tiles lines 128"],
    group_scale: Shaped[Array, "groups outs"] | None,
    table: np.ndarray,
    s: Schedule,
) -> Float[Array, "slots rows outs"]:
    """What ``reference.partial_sums`` gives; slots that a tile does not have are not written at all."""
    chunk = min(s.part, _SWIZZLE)
    # TMA wants whole swizzled rows; up to eight tokens it fills in what is missing
    x = jnp.pad(x, ((0, -s.m % 8 if s.m > 8 else 0), (0, -s.k % chunk)))
    operands = (x, words) if group_scale is None else (x, words, group_scale)
    # from memory, since the compiler copies constants into registers for each use again
    tables = jnp.asarray(np.ascontiguousarray(table).view(np.int32))
    run = plgpu.kernel(
        partial(_fp4_matmul, s=s, chunk=chunk, signed=_signed(table), outs=64 * len(words)),
        out_type=jax.ShapeDtypeStruct((s.slots, s.rows, 64 * len(words)), jnp.float32),
        grid=(s.blocks,),
        grid_names=("block",),
        num_threads=s.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="fp4_matmul",
    )
    return run(*operands, tables)


def _signed(table: np.ndarray) -> bool:
    """Whether a code's highest bit is its number's sign."""
    return bool(np.all(table[8:] == (table[:8] | 0x80)))


def _fp4_matmul(*refs: Any, s: Schedule, chunk: int, signed: bool, outs: int) -> None:
    *operands, tables, out = refs
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    table = [tables[i] for i in range(2 if signed else 4)]

    def place(step: Any) -> tuple[Any, Any, Any, Any]:
        """Token tile, output tile, step along the inputs, and whether there is such a unit: the last block's run may
        be longer than what is left, and multiplies the last unit again then, for nothing."""
        unit = block * s.run + step
        exists, unit = unit < s.units, jnp.minimum(unit, s.units - 1)
        tile, along = lax.div(unit, s.steps), lax.rem(unit, s.steps)
        return lax.div(tile, s.output_tiles), lax.rem(tile, s.output_tiles), along, exists

    def multiply(indices: Any, x: Any, weight: Any, *rest: Any) -> Any:
        *scales, total = rest
        tokens, outputs, along, exists = place(indices[0])
        for i in range(STEP // s.part):

            def products(accumulator: Any, i: int = i) -> Any:
                for start in range(i * s.part, (i + 1) * s.part, chunk):
                    w = _numbers(weight.at[warpgroup], table, start, chunk)
                    plgpu.wgmma(accumulator, w, x.at[:, pl.ds(start, chunk)].transpose((1, 0)))
                return accumulator[...]

            product = pl.run_scoped(products, plgpu.ACC((64, s.tokens), jnp.float32))
            if scales:
                product = product * lax.broadcast_in_dim(_scale(scales[0], i, warpgroup), product.shape, (0,))
            total = total + product
        ends = (indices[0] == s.run - 1) | (along == s.steps - 1)
        first = outputs * s.outputs + warpgroup * 64

        def write(total: Any) -> Any:
            slot = block - s.first_run(tokens * s.output_tiles + outputs)

            @pl.when(exists & (first < outs))
            def _() -> None:
                _store(out.at[slot], total, first, tokens * s.tokens, s)

            return plgpu.layout_cast(jnp.zeros_like(total), plgpu.Layout.WGMMA)

        return lax.cond(ends, write, lambda total: total, total)

    def begin(pipeline: Any) -> None:
        pipeline(plgpu.layout_cast(jnp.zeros((64, s.tokens), jnp.float32), plgpu.Layout.WGMMA))

    specs = [
        plgpu.BlockSpec(
            (s.tokens, STEP),
            lambda step: (place(step)[0], place(step)[2]),
            transforms=(plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(chunk)),
        ),
        plgpu.BlockSpec((s.warpgroups, STEP // 16, 128), lambda step: (*place(step)[1:3], 0)),
    ]
    if s.group is not None:
        steps = max(s.group // STEP, 1)  # of a group
        specs.append(
            plgpu.BlockSpec((STEP // s.part, s.outputs), lambda step: (lax.div(place(step)[2], steps), place(step)[1]))
        )
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(s.run,),
        memory_registers=_LOADING_REGISTERS,
        in_specs=specs,
        max_concurrent_steps=s.stages,
        wg_axis="warpgroup",
        num_compute_wgs=s.warpgroups,
        compute_context=begin,
    )(*operands)


def _scale(scales: Any, i: int, warpgroup: Any) -> Any:
    """Of the step's i-th group, for each output of the warpgroup."""
    found = plgpu.layout_cast(scales[i, pl.ds(warpgroup * 64, 64)], _SCALES)
    if found.dtype == jnp.float32:
        return found
    return lax.bitcast_convert_type((found.astype(jnp.int32) + 127) << 23, jnp.float32)


def _numbers(words: Any, table: list[Any], start: int, count: int) -> Any:
    """The weight [64, count] of the inputs from ``start``, in registers; words: in shared memory, uint32
    [STEP / 16, 128], of which a block of 64 inputs has four rows, one for each warp. table: the bytes of the first
    eight codes and, where the highest bit of a code is not its sign, of the others, four to an int32."""
    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT for _ in table)),
        return_type=plgpu.ShapeDtypeStruct((64, count), jnp.float8_e4m3fn, layout=layout),
    )
    def numbers(_: Any, ref: Any, *table: Any) -> Any:
        tables = [word.registers.flat[0] for word in table]
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda value: mgpu.c(value - (value >> 31 << 32), i32)
        index = lambda value: arith.index_cast(ir.IndexType.get(), value)

        def chosen(nibbles: Any, first: Any, second: Any) -> Any:
            """Four of the eight bytes of two words."""
            operands, assembly = [first, second, nibbles], "prmt.b32 $0, $1, $2, $3;"
            return llvm.inline_asm(i32, operands, assembly, "=r,r,r,r", asm_dialect=0, has_side_effects=False)

        def four_numbers(nibbles: Any, highest: Any) -> Any:
            """As bytes, of the low four nibbles and what is at the top of each byte."""
            numbers = chosen(nibbles, *tables[:2])
            if len(tables) == 2:
                return arith.ori(arith.andi(highest, constant(0x80808080)), numbers)
            others = chosen(nibbles, *tables[2:])
            mask = chosen(constant(0xBA98), highest, highest)  # each byte's top bit, eight times
            return arith.xori(numbers, arith.andi(mask, arith.xori(numbers, others)))

        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
        warp, lane = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
        registers = np.empty(layout.to_mgpu().registers_shape((64, count)), dtype=object)
        four = ir.VectorType.get((4,), i32)
        for column in range(0, count, 16):
            block, word = divmod(start + column, 64)
            if column == 0 or word == 0:
                row = index(arith.addi(warp, constant(4 * block)))
                loaded = vector.load(four, ref, [row, index(arith.shli(lane, constant(2)))])
            codes = vector.extract(loaded, [], [word // 16])
            nibbles = arith.andi(codes, constant(0x77777777))
            halves = (
                four_numbers(nibbles, codes),
                four_numbers(arith.shrui(nibbles, constant(16)), arith.shli(codes, constant(4))),
            )
            for h, half in enumerate(halves):
                bytes_ = vector.broadcast(ir.VectorType.get((1,), i32), half)
                e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
                registers[0, column // 16, 0, 0, h, 0, 0, 0, 0] = vector.bitcast(e4m3, bytes_)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return numbers(words, *table)


def _store(out: Any, total: Any, first: Any, first_token: Any, s: Schedule) -> None:
    """total [64, tokens] into out [m, outs] from output ``first`` and token ``first_token``; eight neighboring threads
    have eight outputs of one token, a sector of memory."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT), return_type=None
    )
    def store(_: Any, out: Any, total: Any, first: Any, first_token: Any) -> None:
        index = ir.IndexType.get()
        column, row = (arith.index_cast(index, value.registers.flat[0]) for value in (first, first_token))

        def written(value: Any, at: Any) -> None:
            memref.store(value, out, [arith.addi(at[1], row), arith.addi(at[0], column)])

        def written_if_any(value: Any, at: Any) -> None:
            count = mgpu.c(s.rows % 8, index)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, at[1], count)):
                memref.store(value, out, [arith.addi(at[1], whole), arith.addi(at[0], column)])

        # one tile of tokens has its own number of rows, several have whole ones
        full = min(s.rows // 8 * 8, s.tokens)
        if full:
            total[:, :full].foreach(written)
        if full < s.tokens and s.rows % 8:
            whole = mgpu.c(full, index)
            total[:, full : full + 8].foreach(written_if_any)

    store(out, total, first, first_token)

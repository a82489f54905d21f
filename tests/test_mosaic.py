"""The kernel as an H100 would run it: compiled, looked at, and its PTX executed on the CPU.

What comes out is compared with the same arithmetic in plain JAX, bit for bit: poison, where a tile has fewer partial
sums than there is room for, included.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from fpq_jax import QuantSpec, quantize_array
from fpq_jax._matmul.fp4_kernel import mosaic, reference
from fpq_jax._matmul.fp4_kernel.fragments import fragments, group_length, table
from fpq_jax._matmul.fp4_kernel.matmul import matmul
from fpq_jax._matmul.fp4_kernel.schedule import Schedule
from fpq_jax.debug import compile_for_hopper

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("hopper_compiler")]

M2 = QuantSpec(constraint="m2")
# tokens, inputs, outputs; tokens of a tile, warpgroups, stages, processors; the weight
CASES = {
    "one token": ((1, 1100, 200), (8, 2, 8, 132), M2),
    "stages used again, runs that end in a tile": ((5, 2048, 384), (8, 2, 3, 5), M2),
    "rows to fill up": ((12, 900, 300), (16, 2, 4, 5), M2),
    "free scales": ((16, 1300, 130), (16, 2, 4, 4), QuantSpec(group_size=64)),
    "int4, the smallest groups": ((3, 1000, 130), (8, 2, 4, 4), QuantSpec(format="int4", group_size=32)),
    "groups that divide no step": ((3, 1000, 130), (8, 2, 4, 4), QuantSpec(format="e3m0", group_size=96)),
    "groups of two steps": ((7, 1300, 130), (8, 2, 4, 4), QuantSpec(group_size=512, constraint="m1")),
    "a scale a row": ((33, 700, 130), (64, 2, 4, 4), QuantSpec(group_size="channel")),
    "many tokens": ((100, 520, 130), (128, 2, 4, 3), M2),
    "several tiles of tokens": ((50, 520, 200), (16, 2, 3, 7), M2),
    "four warpgroups": ((20, 600, 320), (32, 4, 3, 3), QuantSpec(group_size=128, constraint="m2")),
}


@pytest.fixture
def dumped(tmp_path, monkeypatch):
    """Compile a function that has one kernel; what Mosaic says of it: PTX, MLIR, and ptxas' report."""

    def compile_(function, *arguments):
        for name, value in (("PTX", "1"), ("PTXAS", "1"), ("TO", str(tmp_path))):
            monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
        compile_for_hopper(function, *arguments)
        return [next(tmp_path.glob(f"*.{end}")).read_text() for end in ("ptx", "mlir-passes.log", "ptxas")]

    return compile_


def check_assembly(text, report, spec):
    assert re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.(\w+\.\w+)", text) == ["e4m3.e4m3"] * 8
    loads = re.findall(r"ld\.shared\.(\S+)", text)
    assert set(loads) <= {"v4.b32", "s8", "b32"}  # words; exponents or scales
    assert loads.count("v4.b32") == (8 if spec.group_size in (32, 96) else 4)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "ld.local" not in text and "warning" not in report


def frozen(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(("sizes", "tiles", "spec"), CASES.values(), ids=CASES)
def test_what_is_compiled_gives_what_it_should(dumped, sizes, tiles, spec):
    (m, k, n), rng = sizes, np.random.default_rng(sum(sizes))
    w = rng.standard_normal((k, n)) * np.exp2(rng.integers(-4, 4, (k, 1)))
    f = fragments(quantize_array(jnp.asarray(w, jnp.float32), spec))
    s = Schedule(m, k, n, group_length(spec, k), *tiles)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32).astype(jnp.float8_e4m3fn)
    operands = [x, f.words] if f.group_scale is None else [x, f.words, f.group_scale]
    sums = lambda form: lambda x, words, scale=None: form(x, words, scale, table=table(spec.format), s=s)
    text, mlir, report = dumped(sums(mosaic.partial_sums), *operands)
    check_assembly(text, report, spec)

    expected = np.asarray(jax.jit(sums(reference.partial_sums))(*operands))
    chunk = min(s.part, 128)
    operands[0] = jnp.pad(x, ((0, -m % 8 if m > 8 else 0), (0, -k % chunk)))  # as XLA does before the kernel
    launch, program = ptx.launch(mlir), ptx.parse(text)
    assert launch.grid == (s.blocks, 1, 1)
    for seed in range(2):
        found = np.zeros(expected.shape, np.float32)
        buffers = launch.bind([*map(frozen, operands), frozen(table(spec.format).view(np.int32)), found])
        ptx.run(program, launch.grid, buffers, seed=seed, shared_bytes=launch.shared_bytes)
        # a scale that is no power of two is rounded into the sum once by some machines, twice by others
        np.testing.assert_allclose(found, expected, rtol=0 if s.group is None or spec.constraint else 1e-6)


@pytest.mark.parametrize(
    ("m", "spec"), [*((m, M2) for m in (1, 16, 100, 128)), (16, QuantSpec(format="int4", group_size=64))], ids=str
)
def test_real_sizes_spill_nothing(dumped, m, spec):
    """LLaMA-13B's down projection, in the tiles that are used."""
    shape = jax.ShapeDtypeStruct
    f = jax.eval_shape(lambda w: fragments(quantize_array(w, spec)), shape((13824, 5120), jnp.float32))
    text, _, report = dumped(matmul, shape((m, 13824), jnp.float8_e4m3fn), f)
    check_assembly(text, report, spec)

"""The interpreter of PTX against independent answers, and that it finds what is broken."""

import re
from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
import ptx
import pytest

import fpq_jax
import fpq_jax.debug
from fpq_jax._matmul.fp4_kernel import mosaic
from fpq_jax._matmul.fp4_kernel.fragments import table
from fpq_jax._matmul.fp4_kernel.schedule import Schedule

pytestmark = pytest.mark.full

E4M3 = ml_dtypes.float8_e4m3fn


def frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array


def kernel(body: str, parameters: int = 2, threads: int = 32, descriptors: int = 0):
    """`body` as a kernel of global pointers %rd0, %rd1, ..., with %r0 the thread and %rd10 + i its i-th word there."""
    names = [f".param .u64 .ptr .align 16 p{i}" for i in range(parameters)]
    names += [f".param .align 64 .b8 maps[{128 * descriptors}]"] if descriptors else []
    loads = "".join(
        f"ld.param.b64 %rd{i}, [p{i}]; cvta.to.global.u64 %rd{i}, %rd{i}; mad.wide.u32 %rd{10 + i}, %r0, 4, %rd{i};\n"
        for i in range(parameters)
    )
    return ptx.parse(f"""
        .version 9.0
        .target sm_90a
        .visible .entry test({", ".join(names)}) .maxntid {threads}, 1, 1 {{
        .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<400>; .reg .b64 %rd<40>;
        .shared .align 1024 .b8 memory;
        mov.u32 %r0, %tid.x;
        {loads}
        {body}
        ret;
        }}""")


def words(body: str, *inputs: np.ndarray, threads: int = 32, seed: int = 0) -> np.ndarray:
    """Run `body` with %r1, %r2, ... one word of each input per thread; it leaves its result in %r9."""
    loads = "".join(f"ld.global.b32 %r{i}, [%rd{10 + i}];\n" for i in range(1, len(inputs) + 1))
    program = kernel(f"{loads} {body}\n st.global.b32 [%rd10], %r9;", len(inputs) + 1, threads)
    result = np.empty(threads, np.uint32)
    ptx.run(program, 1, [result, *(frozen(array) for array in inputs)], seed=seed, shared_bytes=0)
    return result


def random_words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)


def test_prmt_takes_bytes_and_replicated_signs():
    a, b, c = random_words(3, 32)
    expected = []
    for low, high, selector in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        pool = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        chosen = [(pool[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
        taken = bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in chosen)
        expected.append(int.from_bytes(taken, "little"))
    assert words("prmt.b32 %r9, %r1, %r2, %r3;", a, b, c).tolist() == expected


def signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("add.s32 %r9, %r1, %r2", lambda a, b: a + b),
        ("sub.s32 %r9, %r1, -7", lambda a, b: a + 7),
        ("mul.lo.s32 %r9, %r1, %r2", lambda a, b: a * b),
        ("mul.hi.u32 %r9, %r1, %r2", lambda a, b: a * b >> 32),
        ("mul.hi.s32 %r9, %r1, %r2", lambda a, b: signed(a) * signed(b) >> 32),
        ("mad.lo.s32 %r9, %r1, %r2, 5", lambda a, b: a * b + 5),
        ("min.s32 %r9, %r1, %r2", lambda a, b: min(signed(a), signed(b))),
        ("max.u32 %r9, %r1, %r2", max),
        ("div.s32 %r9, %r1, 7", lambda a, b: int(Fraction(signed(a), 7))),
        ("rem.s32 %r9, %r1, 7", lambda a, b: signed(a) - 7 * int(Fraction(signed(a), 7))),
        ("and.b32 %r8, %r2, 63; shl.b32 %r9, %r1, %r8", lambda a, b: a << (b & 63)),
        ("and.b32 %r8, %r2, 63; shr.s32 %r9, %r1, %r8", lambda a, b: signed(a) >> (b & 63)),
        ("and.b32 %r8, %r2, 63; shr.u32 %r9, %r1, %r8", lambda a, b: a >> (b & 63)),
        ("lop3.b32 %r9, %r1, %r2, 255, 0xCA", lambda a, b: a & b | ~a & 255),
        ("bfe.u32 %r9, %r1, 5, 9", lambda a, b: a >> 5 & 511),
        ("bfe.s32 %r9, %r1, 5, 9", lambda a, b: (a >> 5 & 511) - 512 * (a >> 13 & 1)),
        ("bfi.b32 %r9, %r1, %r2, 5, 9", lambda a, b: b & ~(511 << 5) | (a & 511) << 5),
        (
            "mul.wide.s32 %rd9, %r1, %r2; shr.u64 %rd9, %rd9, 20; cvt.u32.u64 %r9, %rd9",
            lambda a, b: signed(a) * signed(b) >> 20,
        ),
        (
            "mov.b64 %rd9, {%r1, %r2}; bfe.u64 %rd9, %rd9, 30, 14; cvt.u32.u64 %r9, %rd9",
            lambda a, b: (b << 32 | a) >> 30 & 0x3FFF,
        ),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1}", lambda a, b: a << 16 | a >> 16),
        ("cvt.s32.s8 %r9, %r1", lambda a, b: (a & 255) - 2 * (a & 128)),
        ("setp.lt.s32 %p1|%p2, %r1, %r2; selp.b32 %r9, 3, 4, %p2", lambda a, b: 4 if signed(a) < signed(b) else 3),
        ("setp.gt.u32 %p1, %r1, %r2; not.pred %p1, %p1; selp.b32 %r9, 3, 4, %p1", lambda a, b: 4 if a > b else 3),
    ],
)
def test_integers(instruction, answer):
    a, b = random_words(2, 32)
    expected = [answer(x, y) & 0xFFFFFFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert words(instruction + ";", a, b).tolist() == expected


def test_floats_are_rounded_once():
    a, b, c = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    c = (c * 2.0 ** np.random.default_rng(2).integers(-30, 3, 512)).astype(np.float32)
    got = words("fma.rn.f32 %r9, %r1, %r2, %r3;", *(v.view(np.uint32) for v in (a, b, c)), threads=512).view(np.float32)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        errors = [
            abs(Fraction(float(n)) - exact)
            for n in (np.nextafter(result, -np.inf), result, np.nextafter(result, np.inf))
        ]
        assert errors[1] == min(errors)
    got = words("cvt.rni.s32.f32 %r9, %r1;", (100 * a[:32]).view(np.uint32)).view(np.int32)
    assert got.tolist() == [round(v) for v in (100 * a[:32]).tolist()]


@pytest.mark.parametrize(
    ("mode", "clamp", "answer"),
    [
        ("idx", 31, lambda lane: 5),
        ("idx", 0x181F, lambda lane: lane & 24 | 5),
        ("up", 0, lambda lane: lane - 5 if lane >= 5 else lane),
        ("down", 31, lambda lane: lane + 5 if lane + 5 < 32 else lane),
        ("bfly", 31, lambda lane: lane ^ 5),
    ],
)
def test_shfl(mode, clamp, answer):
    a = random_words(32)
    got = words(f"shfl.sync.{mode}.b32 %r9|%p1, %r1, 5, {clamp}, -1;", a)
    assert got.tolist() == [int(a[answer(lane)]) for lane in range(32)]


@pytest.mark.parametrize("seed", range(4))
def test_lanes_diverge_and_meet_again(seed):
    """Each lane sums 1..lane (a loop whose end lanes reach at different times) and the odd ones negate, out of line."""
    body = """
        mov.b32 %r9, 0; mov.b32 %r2, 0;
        LOOP: setp.ge.s32 %p1, %r2, %r1; @%p1 bra DONE;
        add.s32 %r2, %r2, 1; add.s32 %r9, %r9, %r2; bra.uni LOOP;
        DONE: and.b32 %r3, %r1, 1; setp.eq.b32 %p2, %r3, 1; @%p2 bra ODD;
        BACK: shfl.sync.idx.b32 %r4, %r9, 31, 31, -1; add.s32 %r9, %r9, %r4; bra.uni END;
        ODD: neg.s32 %r9, %r9; bra.uni BACK;
        END:"""
    lanes = np.arange(32, dtype=np.uint32)
    expected = [(-1 if lane % 2 else 1) * lane * (lane + 1) // 2 - 496 for lane in range(32)]
    assert words(body, lanes, seed=seed).view(np.int32).tolist() == expected


def test_a_sync_that_some_lanes_never_reach():
    body = "setp.lt.u32 %p1, %r1, 9; @%p1 bra SKIP; shfl.sync.idx.b32 %r9, %r1, 0, 31, -1; SKIP: bar.sync 0;"
    with pytest.raises(ptx.KernelError, match="diverged"):
        words(body, np.arange(32, dtype=np.uint32))


LOAD = """
    add.s64 %rd30, %rd20, SIZE; cvt.u32.u64 %r30, %rd30; cvt.u32.u64 %r31, %rd20;
    setp.eq.u32 %p9, %r0, 0;
    @%p9 mbarrier.init.shared.b64 [%r30], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p9 mbarrier.arrive.expect_tx.shared.b64 %rd31, [%r30], SIZE;
    mov.b64 %rd32, maps; cvta.param.u64 %rd32, %rd32;
    @%p9 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r31], [%rd32, {COORDINATES}], [%r30];
    { .reg .pred P1;
    WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r30], 0, 1000;
    @P1 bra.uni DONE;
    bra.uni WAIT;
    DONE: }
"""


def load(size: int, column: int, row: int) -> str:
    return "mov.b64 %rd20, memory;" + LOAD.replace("SIZE", str(size)).replace("COORDINATES", f"{column}, {row}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("span", [16, 32, 64, 128])
def test_tma_swizzles_and_fills_with_zeros(span, seed):
    """A box of 16 rows of `span` bytes, three rows and a part of its columns outside of the tensor."""
    data = frozen(np.random.default_rng(0).integers(1, 256, (13, 160), dtype=np.uint8))
    box = 16 * span
    tensor = ptx.TensorMap((13, 160), (160, 1), (16, span), span, 1, array=data)
    body = (
        load(box, 160 - span // 2, 0)
        + f"""
        mov.u32 %r1, %r0;
        LOOP: cvt.u64.u32 %rd21, %r1; add.s64 %rd22, %rd20, %rd21; ld.shared.u8 %rs1, [%rd22];
        add.s64 %rd23, %rd0, %rd21; st.global.u8 [%rd23], %rs1;
        add.s32 %r1, %r1, 32; setp.lt.u32 %p1, %r1, {box}; @%p1 bra LOOP;"""
    )
    result = np.empty(box, np.uint8)
    ptx.run(kernel(body, 1, descriptors=1), 1, [result, [tensor]], seed=seed, shared_bytes=box + 8)
    logical = np.zeros((16, span), np.uint8)
    logical[:13, : span // 2] = data[:, 160 - span // 2 :]
    chunks = logical.reshape(16, span // 16, 16)
    shift, keep = {16: (0, 0), 32: (2, 1), 64: (1, 3), 128: (0, 7)}[span]
    expected = np.stack([chunks[row, np.arange(span // 16) ^ ((row >> shift) & keep)] for row in range(16)])
    assert (result.reshape(expected.shape) == expected).all()


@pytest.mark.parametrize(("tokens", "span"), [(8, 128), (16, 64), (24, 32), (128, 128), (256, 64)])
def test_wgmma_is_a_matrix_product(tokens, span):
    rng = np.random.default_rng(tokens)
    a, b = (frozen(rng.standard_normal((rows, span)).astype(E4M3)) for rows in (64, tokens))
    tensor = ptx.TensorMap((tokens, span), (span, 1), (tokens, span), span, 1, array=b)
    accumulators = ",".join(f"%r{100 + i}" for i in range(tokens // 2))
    descriptor = {128: 1, 64: 2, 32: 3}[span] << 62 | (8 * span >> 4) << 32 | 1 << 16
    body = (
        load(tokens * span, 0, 0)
        + "shr.u32 %r1, %r0, 5; and.b32 %r2, %r0, 31; shr.u32 %r3, %r2, 2; and.b32 %r4, %r2, 3;"
    )
    body += f"mad.lo.s32 %r5, %r1, 16, %r3; mul.lo.s32 %r6, %r5, {span}; mad.lo.s32 %r6, %r4, 4, %r6;"
    body += "cvt.u64.u32 %rd21, %r6; add.s64 %rd21, %rd1, %rd21;"
    body += f"bfe.u64 %rd22, %rd20, 4, 14; or.b64 %rd22, %rd22, {descriptor};"
    body += "".join(f"mov.b32 %r{100 + i}, 0f00000000;" for i in range(tokens // 2))
    for k in range(0, span, 32):
        for i, (row, column) in enumerate([(0, 0), (8, 0), (0, 16), (8, 16)]):
            body += f"ld.global.b32 %r{10 + k // 8 + i}, [%rd21+{row * span + k + column}];"
    body += "wgmma.fence.sync.aligned;"
    for k in range(0, span, 32):
        fragments = ",".join(f"%r{10 + k // 8 + i}" for i in range(4))
        body += f"add.s64 %rd23, %rd22, {k // 16}; {{ .reg .pred p; setp.ne.b32 p, {k}, 0;"
        body += f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.f32.e4m3.e4m3"
        body += f" {{{accumulators}}}, {{{fragments}}}, %rd23, p, 1, 1; }}"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += f"mad.lo.s32 %r6, %r5, {tokens}, 0; mad.lo.s32 %r6, %r4, 2, %r6; mad.wide.u32 %rd24, %r6, 4, %rd0;"
    for i in range(tokens // 2):
        body += f"st.global.f32 [%rd24+{4 * (i // 4 * 8 + i // 2 % 2 * 8 * tokens + i % 2)}], %r{100 + i};"
    result = np.empty((64, tokens), np.float32)
    program = kernel(body, 2, threads=128, descriptors=1)
    ptx.run(program, 1, [result, a, [tensor]], seed=tokens, shared_bytes=tokens * span + 8)
    np.testing.assert_allclose(result, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-6, atol=1e-6)


def test_two_ctas_store_to_one_address():
    program = kernel("st.global.b32 [%rd10], %r0;", 1)
    ptx.run(program, 2, [np.empty(32, np.uint32)], seed=0, shared_bytes=0, blocks=[1])
    with pytest.raises(ptx.KernelError, match="two threads store"):
        ptx.run(program, 2, [np.empty(32, np.uint32)], seed=0, shared_bytes=0)


def test_generic_stores_are_fenced_before_the_async_proxy_reads_them():
    product = "{%r50,%r51,%r52,%r53}, {%r54,%r55,%r56,%r57}, %rd22, p, 1, 1"
    body = "mov.b64 %rd20, memory; mul.wide.u32 %rd21, %r0, 4; add.s64 %rd21, %rd20, %rd21; mov.b32 %r1, 0; "
    body += "st.shared.b32 [%rd21], %r1; st.shared.b32 [%rd21+512], %r1; FENCE bar.sync 0;"
    body += "".join(f"mov.b32 %r{i}, 0;" for i in range(50, 58))
    body += (
        f"bfe.u64 %rd22, %rd20, 4, 14; or.b64 %rd22, %rd22, {1 << 62 | 64 << 32 | 1 << 16}; wgmma.fence.sync.aligned;"
    )
    body += f"{{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {product}; }}"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; st.global.b32 [%rd10], %r50;"
    result = np.empty(128, np.float32)
    fenced = kernel(body.replace("FENCE", "fence.proxy.async.shared::cta;"), 1, threads=128)
    ptx.run(fenced, 1, [result], seed=0, shared_bytes=1024)
    assert (result == 0).all()
    with pytest.raises(ptx.KernelError, match=r"fence\.proxy\.async"):
        ptx.run(kernel(body.replace("FENCE", ""), 1, threads=128), 1, [result], seed=0, shared_bytes=1024)


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"tex\.2d"):
        kernel("tex.2d.v4.f32.s32 %r1, %r2;")


def test_tensor_maps_keep_the_rules_of_the_driver():
    with pytest.raises(ptx.KernelError, match="no wider than the swizzle"):
        ptx.TensorMap((64, 128), (128, 1), (8, 128), 64, 1)
    with pytest.raises(ptx.KernelError, match="multiples of 16 bytes"):
        ptx.TensorMap((64, 40), (40, 1), (8, 16), 16, 1)


# one configuration of the kernel in which every block fills each stage several times
CASE = Schedule(m=16, k=2048, n=256, group=256, tokens=16, warpgroups=2, stages=2, processors=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, hopper_compiler):
    """The kernel's PTX, its launch and operands."""
    folder = tmp_path_factory.mktemp("dump")
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(-8, 9, (16, 2048)).astype(E4M3),
        rng.integers(0, 2**32, (4, 128, 128), dtype=np.uint32),
        rng.integers(-3, 4, (8, 256)).astype(np.int8),
    ]
    run = lambda *operands: mosaic.partial_sums(*operands, table=table(fpq_jax.E2M1), s=CASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        fpq_jax.debug.compile_for_hopper(run, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
    text, mlir = (next(folder.glob(f"*.{end}")).read_text() for end in ("ptx", "mlir-passes.log"))
    arrays = [*arrays, table(fpq_jax.E2M1).view(np.int32)]  # as the kernel has them
    return text, ptx.launch(mlir), [frozen(array) for array in arrays]


def execute(text, launch, arrays, seed=0):
    out = np.empty((CASE.slots, 16, 256), np.float32)
    arguments = launch.bind([*arrays, out])
    ptx.run(ptx.parse(text), launch.grid, arguments, seed=seed, shared_bytes=launch.shared_bytes)
    return out


WAIT = r"\{\s*\.reg \.pred\s+P1;(?:(?!\}).)*?try_wait(?:(?!\}).)*\}"
FAULTS = {  # what to break: (pattern, replacement, which of its occurrences, what is said about it)
    "no wait before the operands are read": (WAIT, "", slice(None), "nothing has been written|in flight|not all"),
    "no wait_group": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", slice(None), "no wgmma.wait_group has covered"),
    "no commit_group": (r"wgmma\.commit_group\.sync\.aligned;", "", slice(None), "no wgmma.wait_group has covered"),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", "", slice(None), "without a wgmma.fence"),
    "a copy too few": (r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", "", slice(1), "deadlock"),
    "too few bytes expected": (
        r"mov\.b32 (\s*%r\d+), 128;",
        r"mov.b32 \1, 127;",
        slice(None),
        "deadlock|range|written",
    ),
    "no arrival of the consumers": (r"mbarrier\.arrive\.release[^;]*;", "", slice(None), "deadlock"),
    "an arrival too many": (
        r"(mbarrier\.arrive\.release[^;]*;)",
        r"\1 \1",
        slice(None),
        "arrivals|in flight|deadlock|written",
    ),
    "stores out of bounds": (
        r"st\.global\.b32(\s+)\[(%rd\d+)\+",
        r"st.global.b32\1[\2+16777216",
        slice(1),
        "out of bounds",
    ),
    "no fence behind the barriers' initialization": (
        r"fence\.mbarrier_init[^;]*;",
        "",
        slice(None),
        "fence.mbarrier_init",
    ),
    "more registers than there are": (r"(setmaxnreg\.inc\S*\s+)232", r"\g<1>256", slice(None), "registers of 65536"),
    "an arrival that releases nothing": (
        r"mbarrier\.arrive\.release",
        "mbarrier.arrive.relaxed",
        slice(None),
        "relaxed",
    ),
    "lanes that skip a wgmma": (r"(wgmma\.commit_group)", r"@%p2 \1", slice(1), "predicated differently"),
}


def broken(text: str, pattern: str, replacement, occurrences: slice) -> str:
    matches = list(re.finditer(pattern, text, re.S))[occurrences]
    assert matches
    for match in reversed(matches):
        text = text[: match.start()] + re.sub(pattern, replacement, match[0], flags=re.S) + text[match.end() :]
    return text


def test_the_whole_kernel_gives_the_same_in_every_order(whole):
    first = execute(*whole)
    assert np.isfinite(first[0]).all()
    for seed in range(1, 4):
        np.testing.assert_array_equal(execute(*whole, seed=seed), first)


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_kernel_is_caught(whole, name):
    text, launch, arrays = whole
    pattern, replacement, occurrences, message = FAULTS[name]
    with pytest.raises((ptx.KernelError, NotImplementedError), match=message):
        execute(broken(text, pattern, replacement, occurrences), launch, arrays)


def test_a_stage_that_is_filled_again_too_early_is_caught(whole):
    """Without the waits of the warpgroup that loads: a race, which most orders show."""
    text, launch, arrays = whole
    expected = execute(*whole)
    start, stop = text.index("setmaxnreg.dec"), text.index("setmaxnreg.inc")
    for wait in reversed(list(re.finditer(WAIT, text, re.S))):
        if start < wait.start() < stop:
            text = text[: wait.start()] + text[wait.end() :]
    assert text != whole[0]
    caught = 0
    for seed in range(6):
        try:
            caught += not np.array_equal(execute(text, launch, arrays, seed), expected, equal_nan=True)
        except ptx.KernelError:
            caught += 1
    assert caught >= 4


def test_a_wrong_swizzle_gives_wrong_numbers(whole):
    text, launch, arrays = whole
    other = broken(text, r"46116865681\d+", lambda match: str(int(match[0]) ^ 3 << 62), slice(None))
    assert not np.array_equal(execute(other, launch, arrays), execute(*whole), equal_nan=True)

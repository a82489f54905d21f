"""What the parts of the suite share: its sizes, its clock, timing, and the ceilings of the hardware."""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpq_jax.debug.hopper import ROUTE_OPTIONS as CUBLAS_AND_TRITON

# NVIDIA's datasheet of the H100 SXM, dense: TFLOP/s and GB/s
DATASHEET = {"fp8": 1979.0, "bf16": 989.0, "fp32": 67.0, "bandwidth": 3350.0}
# of the second route XLA's autotuner may still choose cuBLAS for a product; the rows say how often it did
ROUTE_OPTIONS: dict[str, dict[str, Any]] = {
    "cublas": CUBLAS_AND_TRITON["cublas"],
    "triton": {"xla_gpu_enable_triton_gemm": True},
}
_LEAST_SECONDS = 0.02  # of work between two looks at the clock, so that a launch and a wait cost little of it


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. hidden, ffn, layers, vocab: of each LLaMA by name."""

    models: dict[str, tuple[int, int, int, int]]
    tokens: tuple[int, ...]
    routes: tuple[str, ...]  # of ROUTE_OPTIONS
    few_tokens: tuple[int, ...]  # of our own kernel
    kernel_checks: int
    checked_tokens: tuple[int, ...]
    checked_linear: tuple[int, int]
    cold_bytes: int  # weights that one timed program reads, more than a cache holds
    prompt: int
    decode: tuple[tuple[int, int], ...]  # (batch, slots of the cache)
    decode_steps: int
    group_size: int
    calibration: tuple[int, int]  # windows and tokens in each
    pipeline_layers: int
    repeats: int


FULL = Sizes(
    models={
        "LLaMA-7B": (4096, 11008, 32, 32000),
        "LLaMA-13B": (5120, 13824, 40, 32000),
        "LLaMA-30B": (6656, 17920, 60, 32000),
    },
    tokens=(1, 16, 64, 256, 1024, 4096),
    routes=("cublas", "triton"),
    few_tokens=(1, 2, 4, 8, 16, 32, 64, 128),
    kernel_checks=24,
    checked_tokens=(1, 5, 300),
    checked_linear=(11008, 4096),
    cold_bytes=256 * 2**20,
    prompt=2048,
    decode=((1, 2048), (16, 2048), (64, 1024)),
    decode_steps=16,
    group_size=256,
    calibration=(128, 2048),
    pipeline_layers=3,
    repeats=5,
)
TINY = Sizes(
    models={"tiny": (128, 256, 2, 256)},
    tokens=(5,),
    routes=("cublas",),
    few_tokens=(3,),
    kernel_checks=2,
    checked_tokens=(5,),
    checked_linear=(640, 256),
    cold_bytes=2**15,
    prompt=32,
    decode=((3, 32),),
    decode_steps=2,
    group_size=32,
    calibration=(2, 32),
    pipeline_layers=2,
    repeats=1,
)


@dataclass
class Clock:
    """Time left to the whole suite, and to the part that is running."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)
    part_ends: float = float("inf")

    def left(self) -> float:
        now = time.perf_counter()
        return min(self.began + self.seconds, self.part_ends) - now

    def start_part(self, seconds: float) -> None:
        self.part_ends = time.perf_counter() + seconds


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def compiler_options(route: str) -> dict[str, Any]:
    return ROUTE_OPTIONS[route] if on_gpu() else {}


def torch_on_gpu() -> Any:
    """The torch module where it is installed with a GPU to use, otherwise None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Best wall time of a call among several that are waited for together; the first call does not count."""
    jax.block_until_ready(run())

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count - 1):
            run()
        jax.block_until_ready(run())
        return (time.perf_counter() - began) / count

    count = int(np.clip(_LEAST_SECONDS / timed(1), 1, 100))
    return min(timed(count) for _ in range(repeats))


def torch_seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The same of torch code on a GPU, recorded as a CUDA graph so that launches cost what they cost in XLA."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


def compiled_in_parallel(jobs: Sequence[Any], compile_: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """(job, what compile_ made of it or its exception), in order, when all are done; several at a time."""

    def attempt(job: Any) -> Any:
        try:
            return compile_(job)
        except Exception as error:  # a case that cannot be compiled is reported, and the others go on
            return error

    with ThreadPoolExecutor(8 if on_gpu() else 1) as pool:
        return list(zip(jobs, pool.map(attempt, jobs), strict=True))


def floor_seconds(bytes_: float, tera_ops: dict[str, float], ceilings: dict[str, float]) -> float:
    """The time that nothing can beat: all bytes at full bandwidth, or all operations at their full rates."""
    return max(
        bytes_ / (ceilings["bandwidth"] * 1e9), sum(ops / ceilings[kind] for kind, ops in tera_ops.items() if ops)
    )


def measured_ceilings(repeats: int) -> dict[str, float]:
    """What this device reaches on plain copies and large products; the keys of DATASHEET."""
    n, length = (8192, 2**30) if on_gpu() else (256, 2**18)
    x = jnp.ones(length, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    seconds = seconds_of(lambda: copy(x), repeats)
    found = {"bandwidth": 2 * x.nbytes / seconds / 1e9}
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.standard_normal((n, n)), jnp.float32) for _ in range(2))
    for kind, dtype in (("fp8", jnp.float8_e4m3fn), ("bf16", jnp.bfloat16), ("fp32", jnp.float32)):
        contract_last = (((1,), (1,)), ((), ()))
        precision = "highest" if kind == "fp32" else None

        def multiply(a, b, contract_last=contract_last, precision=precision):
            return jax.lax.dot_general(
                a, b, contract_last, preferred_element_type=jnp.float32, precision=precision
            ).astype(jnp.bfloat16)

        a, b = left.astype(dtype), right.astype(dtype)
        program = jax.jit(multiply).lower(a, b).compile(compiler_options=compiler_options("cublas"))
        found[kind] = 2 * n**3 / seconds_of(lambda p=program, a=a, b=b: p(a, b), repeats) / 1e12
    return found


def filled(tree: Any, seed: int = 0) -> Any:
    """Arrays of numbers that make sense for each shape: codes of all values but NaN, equal scales, small weights."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([_fill(leaf.shape, str(leaf.dtype), seed + i) for i, leaf in enumerate(leaves)])


def _random(shape: tuple[int, ...], dtype: str, seed: Any) -> jax.Array:
    key = jax.random.key(seed)
    if dtype == "uint8":
        return jax.random.bits(key, shape, jnp.uint8)
    if dtype.startswith("float8"):
        # without the highest bit of the exponent there is no NaN
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8) & 0xBF, dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


_random_compiled = jax.jit(_random, static_argnums=(0, 1))


def _fill(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    if dtype == "int8":
        return jnp.zeros(shape, jnp.int8)
    if dtype == "float32":
        return jnp.full(shape, 2.0**-7)
    return _random_compiled(shape, dtype, seed)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned, for a terminal and for a page."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *text[1:]])


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def ratio_text(above: float | None, below: float | None) -> str:
    return "-" if above is None or below is None else f"{above / below:.2f}"


def free_memory() -> None:
    """Hand back what nobody holds any longer."""
    gc.collect()
    if (torch := torch_on_gpu()) is not None:
        torch.cuda.empty_cache()

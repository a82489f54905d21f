"""What a program becomes on an H100, found out by compiling for one; no GPU is needed.

Needs the extra ``hopper`` (XLA's CUDA compiler and NVIDIA's assembler, no driver) and JAX_PLATFORMS=cpu. There are two
routes for a matrix product: "cublas" (XLA's Triton GEMMs off) and "triton" (with a fixed tile, since no autotuning can
happen without a device).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from fpq_jax._errors import FpqError
from fpq_jax._generation import GREEDY, cache_dtype, prefill, step
from fpq_jax._program import Program

Route = Literal["cublas", "triton"]

# what a route is to the compiler; the tile is fixed, since no autotuning can happen without a device
_TILE = "block_m: 64 block_n: 128 block_k: 128 num_stages: 3 num_warps: 4 num_ctas: 1"
ROUTE_OPTIONS: dict[Route, dict[str, Any]] = {
    "cublas": {"xla_gpu_enable_triton_gemm": False},
    "triton": {"xla_gpu_override_gemm_autotuner": _TILE},
}
# An H100 SXM as XLA describes it. Without runtime_version FP8 products silently become 16-bit ones.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { %s } registers_per_core_limit: 65536 registers_per_block_limit: 65536
  runtime_version: "13.0.0"
}
platform_name: "CUDA"
"""
_CAPABILITIES = {9: "major: 9 feature_extension: ACCELERATED_FEATURES", 8: "major: 8"}


def compile_for_hopper(
    function: Any,
    *arguments: Any,
    route: Route = "cublas",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    capability: int = 9,
    ptx: bool = False,
) -> Program:
    """Compile ``function`` for an H100: its kernels, matrix products and memory. Nothing is run.

    ``arguments``: arrays or ShapeDtypeStructs, in any pytrees; only their shapes and dtypes count. ``ptx`` also keeps
    the assembly of XLA's own kernels. ``capability`` 8 is a GPU without FP8 (an A100's generation), to compare.
    Raises FpqError where the compiler is not to be had.
    """
    if route not in get_args(Route):
        raise FpqError(f"route is {route!r}; it must be {' or '.join(get_args(Route))}.")
    if capability not in _CAPABILITIES:
        raise FpqError(f"capability is {capability!r}; it must be 9 or 8.")
    sharding = jax.sharding.SingleDeviceSharding(_device(capability))
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    abstract = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    shapes = [a if i in static else jax.tree.map(abstract, a) for i, a in enumerate(arguments)]
    lowered = jax.jit(function, donate_argnums=donate_argnums, static_argnums=static_argnums).lower(*shapes)
    with tempfile.TemporaryDirectory() as folder:
        options = ROUTE_OPTIONS[route] | ({"xla_dump_to": folder, "xla_dump_hlo_as_text": False} if ptx else {})
        compiled = lowered.compile(compiler_options=options)
        assembly = "".join(file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.ptx")))
    return Program.of(compiled, assembly)


def hopper(
    model: Any,
    *,
    batch: int = 1,
    tokens: int = 1,
    context: int | None = None,
    kv_cache: str = "model",
    route: Route = "cublas",
    capability: int = 9,
    ptx: bool = False,
) -> Program:
    """What generation with ``model`` becomes on an H100: see ``compile_for_hopper``.

    ``tokens`` 1 is a step that decodes one token for each of ``batch`` rows; more is the prefill of prompts of so many.
    ``context`` slots are in the cache, by default the model's longest. Works on abstract models, so shapes that do not
    fit this machine's memory can be asked about.
    """
    if batch < 1 or tokens < 1:
        raise FpqError(f"batch is {batch} and tokens {tokens}; both must be at least 1.")
    graph, state = nnx.split(model)
    slots = max(tokens, context or model.config.max_position_embeddings)
    cache = jax.eval_shape(lambda: model.init_cache(batch, slots, cache_dtype(model, kv_cache)))
    key, rows = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((batch,), jnp.int32)
    given = rows if tokens == 1 else jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return compile_for_hopper(
        step if tokens == 1 else prefill,
        graph,
        GREEDY,
        state,
        given,
        cache,
        rows,
        key,
        route=route,
        donate_argnums=4,
        static_argnums=(0, 1),
        capability=capability,
        ptx=ptx,
    )


def _device(capability: int) -> Any:
    from jax.experimental import topologies

    target = " ".join(_H100.split()) % _CAPABILITIES[capability]
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=target
        )
    except (NotImplementedError, RuntimeError) as error:
        raise FpqError(
            "Compiling for an H100 needs the extra hopper (pip install 'fpq-jax[hopper]') and JAX_PLATFORMS=cpu in the "
            f"environment before JAX starts ({type(error).__name__}: {str(error).partition(chr(10))[0]})."
        ) from error
    return topology.devices[0]

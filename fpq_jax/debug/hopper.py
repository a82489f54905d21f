"""What a program becomes on an H100, found out by compiling for one; no GPU is needed.

Needs the extra ``hopper`` (XLA's CUDA compiler and NVIDIA's assembler, no driver) and JAX_PLATFORMS=cpu. There are two
routes for a matrix product: "cublas" (XLA's Triton GEMMs off) and "triton" (with a fixed tile, since no autotuning can
happen without a device).
"""

import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpq_jax._errors import FpqError
from fpq_jax._generation.generator import GREEDY, cache_dtype, prefill, step
from fpq_jax._generation.row_sharding import Rows, row_keys
from fpq_jax._matmul.fp4_kernel.fragments import Fragments
from fpq_jax._support.mesh import abstract_mesh
from fpq_jax.debug.compiled_program import Program

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
    """Compiles a function for an H100, to see its kernels, matrix products and memory.

    Nothing is run, and no GPU is needed. It needs the extra ``hopper`` and ``JAX_PLATFORMS=cpu`` in the environment
    before JAX starts.

    Args:
        function: the function to compile.
        *arguments: arrays or ``jax.ShapeDtypeStruct``, in any pytrees; only shapes, dtypes and shardings count. Where
            some are on a mesh, the program is that of one device among as many H100s on one host.
        route: how XLA compiles matrix products, ``"cublas"`` (its Triton GEMMs are off) or ``"triton"`` (with a fixed
            tile, since no autotuning can happen without a device).
        donate_argnums: as in ``jax.jit``.
        static_argnums: as in ``jax.jit``.
        capability: the GPU's major compute capability; 8 is one without FP8 (the generation of an A100), to compare.
        ptx: whether to keep the assembly of XLA's own kernels.

    Returns:
        The compiled program.

    Raises:
        FpqError: the compiler is missing, an option has an impossible value, or the arguments are on several meshes.

    Example:
        >>> from fpq_jax.debug import compile_for_hopper
        >>> w = jax.random.normal(jax.random.key(0), (256, 128))
        >>> q = fpq.expand(fpq.quantize_array(w, fpq.QuantSpec(constraint="m2")))
        >>> program = compile_for_hopper(fpq.linear, jnp.ones((16, 256)), q)
        >>> len(program.matmuls("fp8_matmul")), len(program.matmuls("matmul"))
        (1, 0)
    """
    if route not in get_args(Route):
        raise FpqError(f"route is {route!r}; it must be {' or '.join(get_args(Route))}.")
    if capability not in _CAPABILITIES:
        raise FpqError(f"capability is {capability!r}; it must be 9 or 8.")
    ours = jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, Fragments))
    if capability < 9 and any(isinstance(leaf, Fragments) for leaf in ours):
        raise FpqError(f"Our own kernel is for capability 9, not {capability}; use weights fp8 or packed.")
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    where = _on_hoppers([a for i, a in enumerate(arguments) if i not in static], capability)
    abstract = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(leaf))
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
    """Compiles generation with a model for an H100, as ``compile_for_hopper`` does.

    It also works on abstract models, so that shapes can be asked about that do not fit into this machine's memory.

    Args:
        model: one of this library's models. One that is on a mesh is compiled for as many H100s: for two of them,
            ``prepare(model, mesh=jax.sharding.AbstractMesh((1, 2), ("data", "model")))``.
        batch: how many rows there are.
        tokens: 1 for a step that decodes one token of each row; more for the prefill of prompts of so many tokens.
        context: how many tokens the key-value cache holds; by default the model's longest.
        kv_cache: what keys and values are held in, ``"model"`` (the model's dtype) or ``"float8"``.
        route: how XLA compiles matrix products, ``"cublas"`` or ``"triton"``.
        capability: the GPU's major compute capability; 8 is one without FP8, to compare.
        ptx: whether to keep the assembly of XLA's own kernels.

    Returns:
        The compiled program.

    Raises:
        FpqError: ``batch`` or ``tokens`` is less than 1, or as in ``compile_for_hopper``.

    Example:
        >>> from fpq_jax.debug import hopper
        >>> program = hopper(fpq.load("demo-llama", weights="fp8"), context=64)
        >>> len(program.matmuls("fp8_matmul"))  # this model is not quantized
        0
        >>> program.alias_bytes > 0  # the cache is written in place
        True
    """
    if batch < 1 or tokens < 1:
        raise FpqError(f"batch is {batch} and tokens {tokens}; both must be at least 1.")
    graph, state = nnx.split(model)
    slots = max(tokens, context or model.config.max_position_embeddings)
    on = Rows(None if model.mesh is None else abstract_mesh(model.mesh), batch)
    make = lambda: model.init_cache(batch, slots, cache_dtype(model, kv_cache))
    cache = jax.eval_shape(make) if model.mesh is None else on.cache(make)
    keys = jax.eval_shape(lambda: row_keys(0, batch))
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    given = rows if tokens == 1 else jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return compile_for_hopper(
        on.over(step if tokens == 1 else prefill),
        graph,
        GREEDY,
        state,
        given,
        cache,
        rows,
        keys,
        route=route,
        donate_argnums=4,
        static_argnums=(0, 1),
        capability=capability,
        ptx=ptx,
    )


def _on_hoppers(arguments: list[Any], capability: int) -> Callable[[Any], Any]:
    """Where an argument is on H100s, from where it is: one, or a mesh of as many as the arguments'."""
    known = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)]
    meshes = {abstract_mesh(s.mesh) for s in known if isinstance(s, NamedSharding)}
    if not meshes:
        alone = jax.sharding.SingleDeviceSharding(_devices(capability, 1)[0])
        return lambda leaf: alone
    if len(meshes) > 1:
        raise FpqError(f"The arguments are on {len(meshes)} meshes; put them on one.")
    sizes = meshes.pop().shape
    mesh = Mesh(np.array(_devices(capability, math.prod(sizes.values()))).reshape(tuple(sizes.values())), tuple(sizes))
    spec = lambda where: where.spec if isinstance(where, NamedSharding) else PartitionSpec()
    return lambda leaf: NamedSharding(mesh, spec(getattr(leaf, "sharding", None)))


def _devices(capability: int, count: int) -> Any:
    from jax.experimental import topologies

    target = " ".join(_H100.split()) % _CAPABILITIES[capability]
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=target
        )
    except (NotImplementedError, RuntimeError) as error:
        remedy = (
            "needs the extra hopper (pip install 'fpq-jax[hopper]') and JAX_PLATFORMS=cpu in the environment before"
        )
        if (found := _plugin_version()) not in (None, jax.__version__):
            wanted = f"jax {jax.__version__} and found {found}; pip install jax-cuda13-plugin=={jax.__version__} before"
            remedy = f"needs the jax-cuda13-plugin of {wanted}"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise FpqError(f"Compiling for an H100 {remedy} JAX starts ({reason}).") from error
    return topology.devices


def _plugin_version() -> str | None:
    """Of XLA's CUDA compiler, None where it is not installed; it must be that of jax."""
    try:
        return importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        return None

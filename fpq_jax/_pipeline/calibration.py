"""What calibration windows show of a layer: the Hessian at each of its Linears, and static scales of activations.

The forward pass that captures it runs as inference will, with quantized activations. Each device sums over its own
windows; the sums meet once, at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from fpq_jax._algorithms.recipe import LinearRecipe
from fpq_jax._algorithms.statistics import CalibrationStats, SharedInput, hessian
from fpq_jax._matmul.linear import RecordingKernel
from fpq_jax._numerics.formats import Format
from fpq_jax._numerics.scales import Scale, range_scale
from fpq_jax._numerics.spec import ActivationScale
from fpq_jax._pipeline.batches import Batches
from fpq_jax._support.mesh import AXES
from fpq_jax._support.placement import BATCH, abstract, per_device, prefetch_to_devices, replicate, to_devices
from fpq_jax.models.parameters import params_of, with_params
from fpq_jax.models.spec import ModelSpec

Activations = tuple[tuple[str, Format | None, ActivationScale], ...]  # by kernel


def activations_of(todo: dict[str, LinearRecipe]) -> Activations:
    """What a layer's Hessians depend on, of what is to be done to its kernels."""
    return tuple((path, r.spec.activation, r.spec.activation_scale) for path, r in todo.items())


def calibrate(layer: Any, activations: Activations, hidden: list[np.ndarray], batches: Batches) -> CalibrationStats:
    """What each kernel in ``activations`` meets. The layer's arrays are on every device."""
    if not activations:
        return CalibrationStats({}, {})
    mesh = batches.mesh
    graph, state = nnx.split(layer)
    fixed: dict[str, Scale] = {}
    if any(kind == "static" for _, _, kind in activations):
        # a static scale is from the inputs as they are, with nothing in this layer quantized yet
        plain = tuple((path, None, "token") for path, _, _ in activations)
        ranges = [
            jax.device_get(_ranges(graph, plain, mesh, state, rows)) for rows in prefetch_to_devices(hidden, mesh)
        ]
        for path, fmt, kind in activations:
            if kind == "static" and fmt is not None:
                low, high = (pick([r[path][i] for r in ranges]) for i, pick in ((0, min), (1, max)))
                fixed[path] = replicate(range_scale(jnp.asarray(low)[None], jnp.asarray(high)[None], fmt), mesh)
    shapes = _shapes(graph, activations, state, hidden[0], fixed)
    on = NamedSharding(mesh, BATCH)  # a matrix on each device
    sums = {paths: jnp.zeros((mesh.size, *one.shape), one.dtype, device=on) for paths, one in shapes.items()}
    for rows, real in zip(prefetch_to_devices(hidden, mesh), batches.real, strict=True):
        # waited for, or all batches would be on the devices at once
        sums = jax.block_until_ready(
            _accumulate(graph, activations, mesh, state, rows, to_devices(real, mesh), fixed, sums)
        )
    tokens = batches.count * hidden[0].shape[1]
    return CalibrationStats({paths: _mean(total, tokens, mesh) for paths, total in sums.items()}, fixed)


def abstract_accumulate(
    layer: Any, todo: dict[str, LinearRecipe], mesh: Mesh, tokens: tuple[int, int], model_spec: ModelSpec
) -> tuple[Any, list[SharedInput], int]:
    """(the lowered program of a batch of [windows, tokens] at an abstract layer, kernels that share an input, the bytes
    of all Hessians)."""
    activations = activations_of(todo)
    rows = abstract(model_spec.hidden(tokens), mesh, BATCH)
    graph, state = nnx.split(layer)
    state = abstract(state, mesh, P())
    shapes = _shapes(graph, activations, state, rows, {})
    sums = {paths: jax.ShapeDtypeStruct((mesh.size, *one.shape), one.dtype) for paths, one in shapes.items()}
    real = abstract(jax.ShapeDtypeStruct(tokens[:1], bool), mesh, BATCH)
    program = _accumulate.lower(graph, activations, mesh, state, rows, real, {}, abstract(sums, mesh, BATCH))
    return program, list(shapes), sum(one.size * one.dtype.itemsize for one in shapes.values())


def _shapes(
    graph: Any, activations: Activations, state: Any, rows: Any, fixed: dict[str, Scale]
) -> dict[SharedInput, jax.ShapeDtypeStruct]:
    """Of the Hessians that a batch, or what has its shape, gives."""
    real = jax.ShapeDtypeStruct(rows.shape[:1], bool)
    return jax.eval_shape(partial(_hessians, graph, activations), state, rows, real, fixed)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def _accumulate(
    graph: Any,
    activations: Activations,
    mesh: Mesh,
    state: Any,
    hidden: Float[Array, "B L D"],
    real: Bool[Array, " B"],
    fixed: dict[str, Scale],
    sums: dict[SharedInput, Float[Array, "devices in in"]],
) -> dict[SharedInput, Float[Array, "devices in in"]]:
    """``sums`` and X^T X of each distinct Linear input of a batch, keyed by the kernels that see it."""

    def local(state: Any, hidden: Array, real: Array, fixed: Any, sums: Any) -> Any:
        new = _hessians(graph, activations, state, hidden, real, fixed)
        return {paths: total + new[paths][None] for paths, total in sums.items()}

    return per_device(local, mesh, (P(), BATCH, BATCH, P(), BATCH), BATCH)(state, hidden, real, fixed, sums)


def _hessians(
    graph: Any, activations: Activations, state: Any, hidden: Array, real: Array, fixed: dict[str, Scale]
) -> dict[SharedInput, Array]:
    mask = jnp.broadcast_to(real[:, None], hidden.shape[:2])
    return {tuple(paths): hessian(x, mask) for paths, x in _inputs(graph, activations, state, hidden, fixed)}


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def _mean(total: Float[Array, "devices in in"], tokens: int | Array, mesh: Mesh) -> Float[Array, "in in"]:
    """The sums of all devices over the number of tokens, on every device."""
    return jax.lax.with_sharding_constraint(jnp.sum(total, axis=0) / tokens, NamedSharding(mesh, P()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ranges(
    graph: Any, activations: Activations, mesh: Mesh, state: Any, hidden: Float[Array, "B L D"]
) -> dict[str, tuple[Array, Array]]:
    """Least and largest value of each Linear's input in a batch (rows that fill it up repeat others)."""

    def local(state: Any, hidden: Array) -> dict[str, tuple[Array, Array]]:
        inputs = _inputs(graph, activations, state, hidden, {})
        low, high = lambda x: jax.lax.pmin(jnp.min(x), AXES), lambda x: jax.lax.pmax(jnp.max(x), AXES)
        return {path: (low(x), high(x)) for paths, x in inputs for path in paths}

    return per_device(local, mesh, (P(), BATCH), P())(state, hidden)


def _inputs(
    graph: Any, activations: Activations, state: Any, hidden: Array, fixed: dict[str, Scale]
) -> list[tuple[list[str], Array]]:
    """One forward pass of a layer: each distinct Linear input, quantized, and the kernels that see it."""
    seen: list[tuple[Array, tuple[Format | None, bool], Array, list[str]]] = []

    def recorder(path: str, fmt: Format | None) -> Callable[[Array, Array], None]:
        def record(x: Array, quantized: Array) -> None:
            how = (fmt, path in fixed)
            for other, other_how, _, paths in seen:
                if other is x and other_how == how:
                    paths.append(path)
                    return
            seen.append((x, how, quantized, [path]))

        return record

    layer = nnx.merge(graph, state)
    kernels = params_of(layer)
    observed = {
        path: RecordingKernel(kernels[path], fmt, recorder(path, fmt), fixed.get(path)) for path, fmt, _ in activations
    }
    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    with_params(layer, observed)(hidden, positions)
    return [(paths, quantized) for _, _, quantized, paths in seen]

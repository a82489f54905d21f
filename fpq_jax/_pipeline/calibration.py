"""The statistics of a decoder layer's Linears on calibration windows.

The forward pass runs as inference will, with quantized activations; Linears that are quantized already are multiplied
so. Stage by stage is therefore a call for each stage, with what came before in ``params`` as QTensors.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.statistics import CalibrationStats, SharedInput
from fpq_jax._numerics.qtensor import Axes
from fpq_jax._pipeline.batches import Batches
from fpq_jax._support.placement import BATCH, abstract, prefetch_to_devices, to_devices
from fpq_jax._support.trees import Flat
from fpq_jax._transform.accumulate import abstract_accumulate, record_stats, shared_inputs
from fpq_jax._transform.recorder import RecordedKernel, Recorder
from fpq_jax.models.parameters import params_of, with_params
from fpq_jax.models.spec import ModelSpec

Kernels = tuple[tuple[str, RecordedKernel], ...]  # by path


class Stream(NamedTuple):
    """A layer's parameters on every device, by path, and its input for each batch, on the host."""

    params: Flat
    hidden: list[np.ndarray]


def recorded_kernels(recipes: dict[str, LinearRecipe], params: Flat) -> Kernels:
    """What is recorded of a layer whose kernels are to be quantized so; ``params`` may be shapes."""
    of = lambda path: Axes.of(("in", "out"), params[path].shape, params[path].dtype)
    return tuple((path, RecordedKernel.of(of(path), recipe.spec)) for path, recipe in recipes.items())


def calibrate(
    model_spec: ModelSpec, stream: Stream, kernels: Kernels, batches: Batches, *, reference: Stream | None = None
) -> CalibrationStats:
    """The statistics of what each of ``kernels`` meets, on every device.

    ``reference``: the layer in full precision and its own inputs, to be compared with (see ``InputStats.cross``).
    """
    if not kernels:
        return CalibrationStats({}, {})
    recorder, arrays = _recorder(model_spec, stream.params, kernels)
    other = None
    if reference is not None:
        other = (*_recorder(model_spec, reference.params, kernels), _batches(reference.hidden, batches))
    return record_stats(
        recorder,
        arrays,
        _batches(stream.hidden, batches),
        static_batches=lambda: _batches(stream.hidden, batches),
        mesh=batches.mesh,
        reference=other,
    )


def stages(model_spec: ModelSpec, recipes: dict[str, LinearRecipe]) -> list[dict[str, LinearRecipe]]:
    """The kernels of a layer by their inputs, in the order in which the layer comes to them."""
    params = params_of(model_spec.layer())
    recorder, arrays = _recorder(model_spec, params, recorded_kernels(recipes, params))
    batch = model_spec.hidden((1, 2)), jax.ShapeDtypeStruct((1,), bool)
    return [{path: recipes[path] for path in paths} for paths in shared_inputs(recorder, arrays, batch)]


def abstract_calibrate(
    model_spec: ModelSpec, recipes: dict[str, LinearRecipe], mesh: Mesh, tokens: tuple[int, int], *, compared: bool
) -> tuple[Any, list[SharedInput], int]:
    """(the lowered program of a batch of [windows, tokens], kernels that share an input, bytes of the statistics).
    ``compared``: with a reference."""
    params = params_of(model_spec.layer())
    recorder, arrays = _recorder(model_spec, params, recorded_kernels(recipes, params))
    rows = abstract(model_spec.hidden(tokens), mesh, BATCH)
    real = abstract(jax.ShapeDtypeStruct(tokens[:1], bool), mesh, BATCH)
    return abstract_accumulate(recorder, abstract(arrays, mesh, P()), (rows, real), mesh, compared=compared)


def _recorder(model_spec: ModelSpec, params: Flat, kernels: Kernels) -> tuple[Recorder, list[Any]]:
    return Recorder.of(_layer(model_spec), params, dict(kernels), _counted, knows_qtensors=True)


@lru_cache(maxsize=16)
def _layer(model_spec: ModelSpec) -> Callable[..., Array]:
    """A layer as a function of its parameters; one object for each model, so that programs are compiled once."""

    def forward(params: Flat, hidden: Float[Array, "B L D"], real: Bool[Array, " B"]) -> Float[Array, "B L D"]:
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
        return with_params(model_spec.layer(), params)(hidden, positions)[0]

    return forward


def _counted(hidden: Float[Array, "B L D"], real: Bool[Array, " B"]) -> Bool[Array, "B L"]:
    """Rows that fill a batch up do not count."""
    return jnp.broadcast_to(real[:, None], hidden.shape[:2])


def _batches(hidden: list[np.ndarray], batches: Batches) -> Iterator[tuple[Array, Array]]:
    for rows, real in zip(prefetch_to_devices(hidden, batches.mesh), batches.real, strict=True):
        yield rows, to_devices(real, batches.mesh)

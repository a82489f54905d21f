"""Layer after layer: capture what each Linear sees, quantize it, go on behind the quantized layer.

Only one layer's weights and Hessians are alive at a time; the hidden states of the calibration windows stay on the
host between layers. The capturing forward runs as inference will, with quantized activations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax._formats import Format
from fpq_jax._gptq import gptq_with_stats, hessian, output_error
from fpq_jax._linear import Observed
from fpq_jax._lorc import lorc
from fpq_jax._perplexity import batch_size, batches
from fpq_jax._qtensor import QTensor, dequantize, quantize_array
from fpq_jax._recipe import LinearRecipe, Recipe
from fpq_jax._scales import Scale, range_scale
from fpq_jax._spec import ActivationScale
from fpq_jax._tree import Flat, below
from fpq_jax.models import HfCheckpoint, abstract_model, linear_name, params_of, with_params

_TOLERANCE = 1.001  # GPTQ's error may exceed rounding's by this factor of float noise


@dataclass(frozen=True)
class LinearResult:
    """What became of one Linear. Errors are relative output errors; see ``output_error``.

    shape: [in, out]. rounding_error: of plain rounding under the same scales rule. error: of the final weight, GPTQ
    and LoRC done. damping: None where GPTQ did not run. notes: what a person should know. fell_back: GPTQ was asked
    for and rounding was done.
    """

    name: str
    shape: tuple[int, int]
    rounding_error: float
    error: float
    damping: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    fell_back: bool = False


def linears(checkpoint: HfCheckpoint) -> dict[str, str]:
    """Path of each decoder Linear's kernel -> the Linear's name in the Hugging Face checkpoint."""
    kernels = (path for path in checkpoint.shapes if path.startswith("layers.") and path.endswith(".kernel"))
    return {path: linear_name(checkpoint.model_class, path) for path in kernels}


def quantize_checkpoint(
    checkpoint: HfCheckpoint,
    recipe: Recipe,
    windows: Int[np.ndarray, "N L"],
    dtype: DTypeLike,
    *,
    seed: int = 0,
    first_layer: dict[Any, Any] | None = None,
    on_linear: Callable[[LinearResult], None] = lambda result: None,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[Flat, list[LinearResult]]:
    """All parameters by path, the quantized kernels as QTensors of NumPy arrays, and a result per Linear, in order.

    ``first_layer`` keeps what calibration saw in the first layer, for further recipes on the same windows: it depends
    on nothing quantized, only on the activations' formats. Deeper layers' Hessians are each recipe's own.
    """
    names = linears(checkpoint)
    what = recipe.for_linears(names.values())
    model = abstract_model(checkpoint.model_class, checkpoint.model_config, dtype)
    size = batch_size(*windows.shape)
    cut = batches(windows, size)
    masks = [np.broadcast_to(np.arange(size)[:, None] < real, batch.shape) for batch, real in cut]
    positions = jnp.broadcast_to(jnp.arange(windows.shape[1]), cut[0][0].shape)

    params = checkpoint.read(dtype, *checkpoint.model_class.EMBEDDING)
    hidden = _embed(model, params, [batch for batch, _ in cut], positions)
    results: list[LinearResult] = []
    for i, layer in enumerate(model.layers):
        prefix = f"layers.{i}."
        weights = below(checkpoint.read(dtype, prefix), prefix)
        todo = {path: r for path in weights if (r := what.get(names.get(prefix + path, ""))) is not None}
        activations = tuple((path, r.spec.activation, r.spec.activation_scale) for path, r in todo.items())
        shared = first_layer if i == 0 and first_layer is not None else {}
        if activations in shared:
            seen = shared[activations]
        else:
            seen = _calibrate(layer, weights, activations, hidden, positions, masks)
            shared[activations] = jax.device_get(seen) if shared is first_layer else seen
        for path, linear_recipe in todo.items():
            q, result = _quantize_linear(names[prefix + path], weights[path], seen[path], linear_recipe, seed)
            weights[path] = jax.device_get(q)
            results.append(result)
            on_linear(result)
        if i + 1 < len(model.layers):
            graph, state = nnx.split(with_params(layer, weights))
            state = jax.device_put(state)
            hidden = [np.asarray(_forward(graph, state, h, positions)) for h in hidden]
        params.update({prefix + path: leaf for path, leaf in weights.items()})
        on_layer()
    for path in checkpoint.shapes.keys() - params.keys():
        params.update(checkpoint.read(dtype, path))
    return params, results


def _embed(model: Any, params: Flat, tokens: list[np.ndarray], positions: Array) -> list[np.ndarray]:
    """The first layer's input for each batch of tokens, on the host."""

    # the other parameters stay abstract: embedding needs none of them
    @jax.jit
    def embed(params: Flat, batch: Array) -> Array:
        return with_params(model, params).embed(batch, positions)

    return [np.asarray(embed(params, batch)) for batch in tokens]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _forward(graph: Any, state: Any, hidden: Float[Array, "B L D"], positions: Array) -> Float[Array, "B L D"]:
    return nnx.merge(graph, state)(hidden, positions)[0]


class _Seen(NamedTuple):
    """What calibration saw at a Linear: the mean x^T x over all tokens, and the static scale of x where it has one."""

    hessian: Float[Array, "in in"]
    fixed: Scale | None


_Activations = tuple[tuple[str, Format | None, ActivationScale], ...]


def _calibrate(
    layer: Any, weights: Flat, activations: _Activations, hidden: list[np.ndarray], positions: Array, masks: list
) -> dict[str, _Seen]:
    """What each kernel in ``activations`` meets; Linears that share their input share the arrays."""
    if not activations:
        return {}
    graph, state = nnx.split(with_params(layer, weights))
    state = jax.device_put(state)
    fixed: dict[str, Scale] = {}
    if any(kind == "static" for _, _, kind in activations):
        # a static scale is from the inputs as they are, with nothing in this layer quantized yet
        plain = tuple((path, None, "token") for path, _, _ in activations)
        ranges = [_ranges(graph, plain, state, h, positions) for h in hidden]
        for path, fmt, kind in activations:
            if kind == "static" and fmt is not None:
                low, high = min(r[path][0] for r in ranges), max(r[path][1] for r in ranges)
                fixed[path] = range_scale(low[None], high[None], fmt)
    sums = None
    for h, mask in zip(hidden, masks, strict=True):
        new = _hessians(graph, activations, state, h, positions, mask, fixed)
        sums = new if sums is None else _add(sums, new)
    tokens = float(sum(mask.sum() for mask in masks))
    sums = jax.block_until_ready(sums)  # so that a Linear's seconds are its own
    means = {paths: total / tokens for paths, total in sums.items()}
    return {path: _Seen(mean, fixed.get(path)) for paths, mean in means.items() for path in paths}


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@partial(jax.jit, static_argnums=(0, 1))
def _hessians(
    graph: Any,
    activations: _Activations,
    state: Any,
    hidden: Float[Array, "B L D"],
    positions: Array,
    mask: Array,
    fixed: dict[str, Scale],
) -> dict[tuple[str, ...], Float[Array, "in in"]]:
    """X^T X of each distinct Linear input of a batch, keyed by the kernels that see it."""
    inputs = _inputs(graph, activations, state, hidden, positions, fixed)
    return {tuple(paths): hessian(x, mask) for paths, x in inputs}


@partial(jax.jit, static_argnums=(0, 1))
def _ranges(
    graph: Any, activations: _Activations, state: Any, hidden: Float[Array, "B L D"], positions: Array
) -> dict[str, tuple[Array, Array]]:
    """Least and largest value of each Linear's input in a batch (rows that fill it up repeat others)."""
    inputs = _inputs(graph, activations, state, hidden, positions, {})
    return {path: (jnp.min(x), jnp.max(x)) for paths, x in inputs for path in paths}


def _inputs(
    graph: Any, activations: _Activations, state: Any, hidden: Array, positions: Array, fixed: dict[str, Scale]
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
        path: Observed(kernels[path], fmt, recorder(path, fmt), fixed.get(path)) for path, fmt, _ in activations
    }
    with_params(layer, observed)(hidden, positions)
    return [(paths, quantized) for _, _, quantized, paths in seen]


_round = partial(jax.jit, static_argnames="spec")(quantize_array)


def _quantize_linear(
    name: str, weight: np.ndarray, seen: _Seen, recipe: LinearRecipe, seed: int
) -> tuple[QTensor, LinearResult]:
    began = time.perf_counter()
    w, h = jnp.asarray(weight), seen.hessian
    if not bool(jnp.all(jnp.isfinite(h))):
        raise FpqError(f"The inputs of {name} overflow during calibration; use --dtype float32 or bfloat16.")
    notes: list[str] = []
    rounded = _round(w, spec=recipe.spec)
    q, damping, fell_back = rounded, None, False
    unseen = not bool(jnp.any(jnp.diagonal(h) > 0))
    if recipe.method == "gptq" and unseen:
        notes.append("its inputs were all zero during calibration: rounded to nearest instead of GPTQ")
        fell_back = True
    elif recipe.method == "gptq":
        q, stats = gptq_with_stats(w, h, recipe.spec, damping=recipe.damping)
        damping = float(f"{float(stats.damping):.6g}")  # float32's digits are noise to a reader
        if damping > recipe.damping * 1.5:
            notes.append(f"damping raised to {damping:g} until Cholesky succeeded")
        if int(stats.dead):
            notes.append(f"{int(stats.dead)} inputs were zero throughout calibration: their weights are zero now")
    rounding_error = float(output_error(w, dequantize(rounded), h))
    if float(output_error(w, dequantize(q), h)) > rounding_error * _TOLERANCE:
        notes.append("GPTQ's error is above plain rounding's")
    if zeros := int(jnp.sum(jnp.all(w == 0, axis=0))):
        notes.append(f"{zeros} output rows are all zero")
    if recipe.lorc is not None:
        assert recipe.lorc.rank != "auto", "Recipe.with_lorc_rank comes first"
        q = lorc(w, q, rank=recipe.lorc.rank, dtype=recipe.lorc.dtype, seed=seed)
    if seen.fixed is not None:
        asymmetric = recipe.spec.activation is not None and recipe.spec.activation.asymmetric
        q = replace(
            q, input_scale=seen.fixed.scale, input_zero=seen.fixed.zero.astype(jnp.uint8) if asymmetric else None
        )
    error = float(output_error(w, dequantize(q), h))
    seconds = time.perf_counter() - began
    return q, LinearResult(
        name, tuple(weight.shape), rounding_error, error, damping, round(seconds, 3), tuple(notes), fell_back
    )

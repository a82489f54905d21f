"""The gradients of the unquantized model's loss, one layer at a time from the last to the first.

Windows go forward through all layers, and what each layer is given is kept on the disk. Behind the head each window's
labels are drawn from the model's own predictions. Then the gradient by the hidden states goes back layer by layer; each
layer gives it on, and the Fisher information of its kernels. One layer's weights are on the devices at a time. What is
on the disk lets a pass that was stopped go on.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fpq_jax._algorithms.fisher import Fisher, fisher_of
from fpq_jax._pipeline.batches import Batches
from fpq_jax._pipeline.layerwise import embed, forward
from fpq_jax._support.mesh import in_every_process
from fpq_jax._support.placement import BATCH, abstract, per_device, prefetch_to_devices, to_devices, to_host
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import EMBEDDING, HEAD, params_of, with_params
from fpq_jax.models.spec import ModelSpec

Reader = Callable[[str], Flat]  # the parameters of a part on every device, those of a layer without its name

_SHARE, _LEAST = 0.25, 32  # of the calibration windows


def fisher_windows(calibrated: int) -> int:
    """How many of the calibration windows go back: one costs about five times what it costs to calibrate on it."""
    return min(calibrated, max(_LEAST, int(calibrated * _SHARE)))


class LayerBehind(NamedTuple):
    """What the pass back came to: a layer's number, its parameters on every device, its input for each batch on the
    host, and the Fisher information of its kernels."""

    number: int
    params: Flat
    hidden: list[np.ndarray]
    fishers: dict[str, Fisher]


def layers_behind(
    model_spec: ModelSpec,
    read: Reader,
    kernels: Sequence[Sequence[str]],
    batches: Batches,
    place: Path,
    *,
    seed: int = 0,
    finished: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[LayerBehind]:
    """From the last layer to the first, with the Fisher information of each one's ``kernels``.

    ``place``: a folder for what the layers are given, and their gradients. ``finished``: the lowest layer that came
    before the pass was stopped; where the folder still has what is below it, the pass goes on there. ``advance`` is
    called with 1 or more, in all twice for each layer.
    """
    layers, mesh = model_spec.config.num_hidden_layers, batches.mesh
    hidden_file = lambda i: place / f"hidden.{i}.{jax.process_index()}.npy"
    gradient_file = lambda i: place / f"gradient.{i}.{jax.process_index()}.npy"
    load = lambda file: list(np.load(file).view(model_spec.dtype))
    start = layers if finished is None else finished
    needed = [gradient_file(start), *map(hidden_file, range(start))]
    if start == layers or not in_every_process(all(file.is_file() for file in needed)):
        start = layers
        _save(gradient_file(layers), _down(model_spec, read, batches, hidden_file, seed, advance))
    else:
        advance(2 * layers - start)
    gradients = load(gradient_file(start))
    for i in reversed(range(start)):
        hidden, params = load(hidden_file(i)), read(f"layers.{i}")
        chosen = {path: params[path] for path in kernels[i]}
        others = {path: leaf for path, leaf in params.items() if path not in chosen}
        total = _zeros(chosen, mesh)
        for b, (rows, real) in enumerate(zip(prefetch_to_devices(hidden, mesh), batches.real, strict=True)):
            above = to_devices(gradients[b], mesh)
            total, below = _backward(model_spec, mesh, total, chosen, others, rows, above, to_devices(real, mesh))
            gradients[b] = to_host(below)
        _save(gradient_file(i), gradients)
        yield LayerBehind(i, params, hidden, _added_up(total, mesh))
        hidden_file(i).unlink()
        gradient_file(i + 1).unlink(missing_ok=True)
        advance(1)


def _down(
    model_spec: ModelSpec,
    read: Reader,
    batches: Batches,
    hidden_file: Callable[[int], Path],
    seed: int,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
    """Through the layers; what each is given is kept. The gradient by the last one's output for each batch."""
    mesh, layer = batches.mesh, model_spec.layer()
    outer = read(EMBEDDING)
    hidden = embed(model_spec, outer, batches)
    if not model_spec.config.tie_word_embeddings:
        outer = {}
    for i in range(model_spec.config.num_hidden_layers):
        _save(hidden_file(i), hidden)
        forward(with_params(layer, read(f"layers.{i}")), hidden, mesh)
        advance(1)
    head = outer | read(HEAD)
    key = jax.random.key(seed)
    return [
        to_host(_of_loss(model_spec, mesh, head, rows, to_devices(index, mesh), key))
        for rows, index in zip(prefetch_to_devices(hidden, mesh), batches.index, strict=True)
    ]


def _save(file: Path, batches: list[np.ndarray]) -> None:
    """Whole or not at all; as bytes, since files have no name for some dtypes."""
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as opened:
        np.save(opened, np.stack(batches).view(np.uint8))
    unfinished.rename(file)


def abstract_backward(model_spec: ModelSpec, kernels: Sequence[str], mesh: Mesh, tokens: tuple[int, int]) -> Any:
    """The lowered program of a batch of [windows, tokens] through a layer."""
    params = abstract(params_of(model_spec.layer()), mesh, P())
    chosen = {path: params[path] for path in kernels}
    others = {path: leaf for path, leaf in params.items() if path not in chosen}
    rows = abstract(model_spec.hidden(tokens), mesh, BATCH)
    real = abstract(jax.ShapeDtypeStruct(tokens[:1], bool), mesh, BATCH)
    total = abstract(jax.eval_shape(partial(_zeros, chosen, mesh)), mesh, BATCH)
    return _backward.lower(model_spec, mesh, total, chosen, others, rows, rows, real)


@partial(jax.jit, static_argnums=(0, 1))
def _of_loss(
    model_spec: ModelSpec, mesh: Mesh, params: Flat, hidden: Float[Array, "B L D"], index: Int[Array, " B"], key: Array
) -> Float[Array, "B L D"]:
    """The gradient of each window's summed loss by the last layer's output."""

    def local(params: Flat, hidden: Array, index: Array, key: Array) -> Array:
        model = with_params(model_spec.without_layers(), params)

        def window(one: tuple[Array, Array]) -> Array:
            rows, number = one

            def loss(rows: Array) -> Array:
                log_p = jax.nn.log_softmax(model.head(rows[None])[0].astype(jnp.float32))
                labels = jax.random.categorical(jax.random.fold_in(key, number), jax.lax.stop_gradient(log_p))
                return -jnp.sum(jnp.take_along_axis(log_p, labels[:, None], axis=-1))

            return jax.grad(loss)(rows)

        return jax.lax.map(window, (hidden, index))

    return per_device(local, mesh, (P(), BATCH, BATCH, P()), BATCH)(params, hidden, index, key)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _backward(
    model_spec: ModelSpec,
    mesh: Mesh,
    total: dict[str, Fisher],
    kernels: Flat,
    others: Flat,
    hidden: Float[Array, "B L D"],
    above: Float[Array, "B L D"],
    real: Bool[Array, " B"],
) -> tuple[dict[str, Fisher], Float[Array, "B L D"]]:
    """``total`` and a batch's Fisher information, and the gradient by the layer's input."""

    def local(total: Any, kernels: Flat, others: Flat, hidden: Array, above: Array, real: Array) -> Any:
        def window(total: Any, one: tuple[Array, Array, Array]) -> Any:
            rows, gradient, counts = one
            positions = jnp.arange(len(rows))[None]
            run = lambda kernels, rows: with_params(model_spec.layer(), others | kernels)(rows[None], positions)[0][0]
            _, back = jax.vjp(run, kernels, rows)
            of_kernels, below = back(gradient)
            found = {path: fisher_of(g * counts, len(rows) * counts) for path, g in of_kernels.items()}
            return jax.tree.map(lambda old, new: old + new[None], total, found), below

        return jax.lax.scan(window, total, (hidden, above, real))

    specs = (BATCH, P(), P(), BATCH, BATCH, BATCH)
    return per_device(local, mesh, specs, (BATCH, BATCH))(total, kernels, others, hidden, above, real)


def _zeros(kernels: Flat, mesh: Mesh) -> dict[str, Fisher]:
    """One for each device."""
    of = lambda *shape, dtype=jnp.float32: jnp.zeros((mesh.size, *shape), dtype, device=NamedSharding(mesh, BATCH))
    return {
        path: Fisher(of(w.shape[0], w.shape[0]), of(w.shape[1]), of(dtype=jnp.int32)) for path, w in kernels.items()
    }


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _added_up(total: dict[str, Fisher], mesh: Mesh) -> dict[str, Fisher]:
    """Of all devices, on every device."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda one: jax.lax.with_sharding_constraint(jnp.sum(one, axis=0), everywhere), total)

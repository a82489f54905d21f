"""What models predict of each token: how likely the one that follows is, and how far that is from the original.

The head, and all that is made of its logits, run by blocks of tokens: the logits of a whole window of a large
vocabulary are more than a processor's cache holds, and each pass over them would wait for memory.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fpq_jax._support.placement import BATCH, abstract, per_device, to_devices, to_host
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import with_params
from fpq_jax.models.spec import ModelSpec

_BLOCK = 128  # tokens; measured on two cores with 49,152 logits each: half the time of whole windows


class LastLayer(NamedTuple):
    """What a model's head makes predictions of. params: what the head needs, by path, on every device. hidden:
    [b, L, D], the last layer's output for a batch's windows, of this process."""

    model_spec: ModelSpec
    params: Flat
    hidden: Any


def predictions(
    model: LastLayer, tokens: Int[np.ndarray, "b L"], mesh: Mesh, original: LastLayer | None = None
) -> Float[np.ndarray, "b L-1 n"]:
    """Of each token but the first, in float32: its negative log-likelihood; beside an original the Kullback-Leibler
    divergence from it, in nats, and one where the most likely token is the same."""
    models = (model,) if original is None else (model, original)
    hidden = tuple(to_devices(one.hidden, mesh) for one in models)
    specs, params = tuple(one.model_spec for one in models), tuple(one.params for one in models)
    return to_host(_predictions(specs, mesh, params, hidden, to_devices(tokens, mesh)))


def abstract_predictions(
    model_spec: ModelSpec, params: Flat, windows: tuple[int, int], mesh: Mesh, *, compared: bool
) -> Any:
    """The lowered program for a batch of [windows, tokens]; ``params`` are shapes. ``compared``: with an original."""
    if not model_spec.config.tie_word_embeddings:
        params = {p: leaf for p, leaf in params.items() if not p.startswith(model_spec.model_class.EMBEDDING)}
    models = 2 if compared else 1
    rows = abstract(model_spec.hidden(windows), mesh, BATCH)
    tokens = abstract(jax.ShapeDtypeStruct(windows, np.int32), mesh, BATCH)
    of_all = (abstract(params, mesh, P()),) * models, (rows,) * models
    return _predictions.lower((model_spec,) * models, mesh, *of_all, tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _predictions(
    specs: tuple[ModelSpec, ...],
    mesh: Mesh,
    params: tuple[Flat, ...],
    hidden: tuple[Float[Array, "B L _"], ...],
    tokens: Int[Array, "B L"],
) -> Float[Array, "B L-1 n"]:
    def local(params: tuple[Flat, ...], hidden: tuple[Array, ...], tokens: Array) -> Array:
        models = [with_params(spec.without_layers(), own) for spec, own in zip(specs, params, strict=True)]

        def of_block(block: tuple[Array, ...]) -> Float[Array, "tokens n"]:
            following, *rows = block
            logits, *others = (model.head(x[None])[0] for model, x in zip(models, rows, strict=True))
            of_tokens = [_losses(logits, following)]
            if others:
                of_tokens += divergences(logits, *others)
            return jnp.stack(of_tokens, axis=-1).astype(jnp.float32)

        following = jnp.roll(tokens, -1, axis=1)  # no one asks what follows the last one
        found = jax.lax.map(of_block, jax.tree.map(_blocks, (following, *hidden)))
        return found.reshape(-1, found.shape[-1])[: tokens.size].reshape(*tokens.shape, -1)[:, :-1]

    return per_device(local, mesh, (P(), BATCH, BATCH), BATCH)(params, hidden, tokens)


def _blocks(rows: Array) -> Array:
    """[B, L, ...] to blocks of tokens, the last of them filled up with zeros."""
    of_tokens = rows.reshape(-1, *rows.shape[2:])
    size = min(_BLOCK, len(of_tokens))
    filled = jnp.pad(of_tokens, ((0, -len(of_tokens) % size), *[(0, 0)] * (of_tokens.ndim - 1)))
    return filled.reshape(-1, size, *rows.shape[2:])


def losses(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"]) -> Float[Array, "B L-1"]:
    """Negative log-likelihood of each token but the first, in float32."""
    return _losses(logits[:, :-1], tokens[:, 1:])


def _losses(logits: Float[Array, "*B V"], following: Int[Array, "*B"]) -> Float[Array, "*B"]:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def divergences(
    logits: Float[Array, "*B V"], original: Float[Array, "*B V"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """(the Kullback-Leibler divergence from the original in nats, whether the most likely token is the same), in
    float32."""
    ours, theirs = logits.astype(jnp.float32), original.astype(jnp.float32)
    most, most_of_original = (jnp.max(x, axis=-1, keepdims=True) for x in (ours, theirs))
    of_original = jnp.exp(theirs - most_of_original)
    total, total_of_original = jnp.sum(jnp.exp(ours - most), axis=-1), jnp.sum(of_original, axis=-1)
    mean = jnp.sum(of_original * (theirs - ours), axis=-1) / total_of_original
    divergence = mean + jnp.log(total) - jnp.log(total_of_original) + (most - most_of_original)[..., 0]
    return divergence, _first(ours == most) == _first(theirs == most_of_original)


def _first(marked: Bool[Array, "*B V"]) -> Float[Array, "*B"]:
    """The least number that is marked, as a float of which a CPU finds the largest ten times as fast as of whole ones;
    it holds each up to 2^24."""
    numbers = jax.lax.broadcasted_iota(jnp.float32, marked.shape, marked.ndim - 1)
    return -jnp.max(jnp.where(marked, -numbers, -jnp.inf), axis=-1)

"""What the two models share: the order of their parts, and their cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import load
from fpq_jax.models.decoder import Decoder


@pytest.mark.parametrize(("folder", "heads"), [("tiny_llama", 2), ("tiny_opt", 4)])
def test_logits_are_the_head_of_the_layers_of_the_embedding(request, folder, heads):
    model = load(request.getfixturevalue(folder))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    x = model.embed(tokens, positions)
    for layer in model.layers:
        x, _ = layer(x, positions)
    np.testing.assert_array_equal(model(tokens), model.head(x))
    cache = model.init_cache(3, 7, jnp.bfloat16)
    assert isinstance(model, Decoder) and len(cache) == 2
    assert {part.shape for layer in cache for part in (layer.key, layer.value)} == {(3, heads, 7, 12)}

"""A model without its weights."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax

from fpq_jax.models.parameters import abstract_model


class ModelSpec(NamedTuple):
    """What a model is without its weights: class, configuration, and the dtype of what is not quantized."""

    model_class: Any
    config: Any
    dtype: Any

    def without_layers(self) -> Any:
        """An abstract model of the parts before and behind the layers."""
        return _abstract(self, 0)

    def with_one_layer(self) -> Any:
        """An abstract model whose only layer is like all of them."""
        return _abstract(self, 1)

    def layer(self) -> Any:
        """An abstract layer."""
        return self.with_one_layer().layers[0]

    def hidden(self, tokens: tuple[int, int]) -> jax.ShapeDtypeStruct:
        """The hidden states of [windows, tokens]."""
        return jax.ShapeDtypeStruct((*tokens, self.config.hidden_size), self.dtype)


@lru_cache(maxsize=16)
def _abstract(spec: ModelSpec, layers: int) -> Any:
    """One object for all who ask, none of whom changes it (``with_params`` makes copies)."""
    return abstract_model(spec.model_class, replace(spec.config, num_hidden_layers=layers), spec.dtype)

"""Between Hugging Face's names and configurations and our parameters.

A model class has a table NAMES from parameter paths ("layers.0.mlp.up_proj.kernel") to tensor names; kernels are
transposed on the way, since torch stores Linear weights [out, in].
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._support.trees import Flat, flatten, unflatten

EMBEDDING, HEAD = "embedding", "head"  # the parts before and behind the layers
TABLE, HEAD_KERNEL = "embed_tokens.embedding", "lm_head.kernel"  # a tied table is the head, too


def abstract_model(model_class: Any, config: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """The model without memory: every parameter a ShapeDtypeStruct."""
    return nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0)))


def parameter_shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Path of each parameter -> its shape."""
    return {path: leaf.shape for path, leaf in params_of(abstract_model(model_class, config)).items()}


def part_of(model_class: Any, path: str) -> str:
    """The name of the part that a parameter is in."""
    if path.startswith("layers."):
        return ".".join(path.split(".")[:2])
    return EMBEDDING if path.startswith(model_class.EMBEDDING) else HEAD


def part_names(config: Any) -> list[str]:
    """The parts of a model in order: what is before the layers, each layer, what is behind them."""
    return [EMBEDDING, *(f"layers.{i}" for i in range(config.num_hidden_layers)), HEAD]


def params_of(module: Any) -> Flat:
    """The parameters of a module by path."""
    return flatten(nnx.to_pure_dict(nnx.state(module)))


def with_params(module: Any, params: Flat) -> Any:
    """A copy of an (abstract) module that holds ``params``; kernels may be QTensors."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, unflatten(params))
    return nnx.merge(graph, state)


def build_model(model_class: Any, config: Any, params: Flat) -> Any:
    """A model that holds ``params`` on the default device; it computes in the dtype that most of them have."""
    dtypes = [str(leaf.dtype) for leaf in params.values() if not isinstance(leaf, QTensor)]
    dtype = jnp.dtype(max(set(dtypes), key=dtypes.count))
    return with_params(abstract_model(model_class, config, dtype), jax.tree.map(jnp.asarray, params))


def tensor_name(model_class: Any, path: str) -> str:
    """The Hugging Face name of the parameter at ``path``."""
    for pattern, name in model_class.NAMES:
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
    raise KeyError(path)


def linear_name(model_class: Any, path: str) -> str:
    """The Hugging Face name of the Linear whose kernel is at ``path``."""
    return tensor_name(model_class, path).removesuffix(".weight")


def to_hf_tensors(model_class: Any, params: Flat) -> dict[str, np.ndarray]:
    """Unquantized parameters under Hugging Face's names and in its layout."""
    return {
        tensor_name(model_class, path): np.ascontiguousarray(np.asarray(leaf).T if is_kernel(path) else leaf)
        for path, leaf in params.items()
    }


def is_kernel(path: str) -> bool:
    """Whether the parameter is a Linear's weight."""
    return path.endswith(".kernel")

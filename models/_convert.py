"""Between Hugging Face's names and configurations and our parameters.

A model class has a table NAMES from parameter paths ("layers.0.mlp.up_proj.kernel") to tensor names; kernels are
transposed on the way, since torch stores Linear weights [out, in].
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fpq_jax._errors import FpqError
from fpq_jax._tree import Flat, flatten, unflatten

EMBEDDING, HEAD = "embedding", "head"  # the parts before and behind the layers


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FpqError(f"There is no model folder {folder}.")
    if not path.is_file():
        raise FpqError(f"{folder} has no config.json; name the folder of a Hugging Face checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FpqError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FpqError(f"{path} does not hold a JSON object.")
    return config


QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is what older checkpoints have


def quantization_config(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantized weights; None or empty if it has none."""
    return next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)


def check_counts(config: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """FpqError for keys of a config.json that are missing or no positive whole numbers; optional ones may be absent."""
    if missing := [key for key in required if config.get(key) is None]:
        raise FpqError(f"config.json lacks {', '.join(missing)}, which a {config.get('model_type')} model needs.")
    for key in (*required, *optional):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise FpqError(f"config.json: {key} is {value!r}; it must be a positive whole number.")


def find_architecture(config: Mapping[str, Any], architectures: Mapping[str, Any]) -> Any:
    """The model class of a config.json."""
    kind = str(config.get("model_type"))
    if kind not in architectures:
        raise FpqError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(architectures)}.")
    return architectures[kind]


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
    """A model that holds ``params`` on the default device."""
    return with_params(abstract_model(model_class, config), jax.tree.map(jnp.asarray, params))


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

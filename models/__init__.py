"""LLaMA and OPT in Flax NNX, and their conversion from Hugging Face checkpoints."""

from pathlib import Path
from typing import Any

from fpq_jax.models._cache import LayerCache
from fpq_jax.models._convert import (
    EMBEDDING,
    HEAD,
    QUANTIZATION_KEYS,
    abstract_model,
    build_model,
    is_kernel,
    linear_name,
    params_of,
    part_names,
    part_of,
    read_config,
    tensor_name,
    to_hf_tensors,
    with_params,
)
from fpq_jax.models._convert import find_architecture as _find_architecture
from fpq_jax.models._decoder import Decoder
from fpq_jax.models._hf_checkpoint import HfCheckpoint
from fpq_jax.models._prepare import on_mesh, prepare, prepare_in_place
from fpq_jax.models._sharding import check_division, shardings
from fpq_jax.models.llama import Llama, LlamaConfig
from fpq_jax.models.opt import Opt, OptConfig

ARCHITECTURES: dict[str, Any] = {"llama": Llama, "opt": Opt}


def open_checkpoint(folder: Path) -> HfCheckpoint:
    """Open and check a Hugging Face folder of a supported architecture; FpqError says what is wrong."""
    return HfCheckpoint(folder, ARCHITECTURES)


def model_class_of(config: dict[str, Any]) -> Any:
    """The model class that a config.json asks for."""
    return _find_architecture(config, ARCHITECTURES)


def to_hf_config(model: Any) -> dict[str, Any]:
    """The config.json of a model."""
    return model.config.to_hf()


__all__ = [
    "ARCHITECTURES",
    "EMBEDDING",
    "HEAD",
    "QUANTIZATION_KEYS",
    "Decoder",
    "HfCheckpoint",
    "LayerCache",
    "Llama",
    "LlamaConfig",
    "Opt",
    "OptConfig",
    "abstract_model",
    "build_model",
    "check_division",
    "is_kernel",
    "linear_name",
    "model_class_of",
    "on_mesh",
    "open_checkpoint",
    "params_of",
    "part_names",
    "part_of",
    "prepare",
    "prepare_in_place",
    "read_config",
    "shardings",
    "tensor_name",
    "to_hf_config",
    "to_hf_tensors",
    "with_params",
]

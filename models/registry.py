"""The model classes by the model_type of a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from fpq_jax._errors import FpqError
from fpq_jax.models.llama import Llama
from fpq_jax.models.opt import Opt

ARCHITECTURES: dict[str, Any] = {"llama": Llama, "opt": Opt}


def model_class_of(config: Mapping[str, Any]) -> Any:
    """The model class that a config.json asks for. FpqError if it is none of ours."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise FpqError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind]

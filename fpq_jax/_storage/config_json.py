"""config.json of a Hugging Face model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpq_jax._errors import FpqError
from fpq_jax._support.files import read_json_object


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FpqError(f"There is no model folder {folder}.")
    if not path.is_file():
        raise FpqError(f"{folder} has no config.json; name the folder of a Hugging Face checkpoint.")
    return read_json_object(path)


QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is what older checkpoints have


def quantization_config(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantized weights; None or empty if it has none."""
    return next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)

"""config.json of a Hugging Face model folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpq_jax._errors import FpqError


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

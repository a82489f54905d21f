"""What the configurations of all model classes check."""

from collections.abc import Mapping
from typing import Any

from fpq_jax._errors import FpqError


def check_counts(config: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """FpqError for keys of a config.json that are missing or no positive whole numbers; optional ones may be absent."""
    if missing := [key for key in required if config.get(key) is None]:
        raise FpqError(f"config.json lacks {', '.join(missing)}, which a {config.get('model_type')} model needs.")
    for key in (*required, *optional):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise FpqError(f"config.json: {key} is {value!r}; it must be a positive whole number.")

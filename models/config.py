"""The values that a config.json may hold: every one that a model class reads has a type and a range."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fpq_jax._errors import FpqError

_MOST = 2**31 - 1  # of sizes, as XLA's shapes and torch's files have them
_REQUIRED: Any = object()


class ConfigValues:
    """The values of a config.json by key. null is as if the key were absent; what has no ``default`` must be there.

    path: in messages before the key, as "rope_parameters.". Raises FpqError, which names the key, for any other value.
    """

    def __init__(self, config: Mapping[str, Any], path: str = ""):
        self._config = config
        self._path = path

    def items(self) -> Iterable[tuple[str, Any]]:
        """All keys and values, unchecked."""
        return self._config.items()

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self._config.get(key) is not None

    def require(self, *keys: str) -> None:
        """FpqError that names all of those that are absent."""
        if missing := [self._path + key for key in keys if not self.has(key)]:
            of = "" if self._path else f", which a {self._config.get('model_type')} model needs"
            raise FpqError(f"config.json lacks {', '.join(missing)}{of}.")

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise self._wrong(key, value, "a positive whole number" if _is_small(value) else f"at most {_MOST}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, least: float = 0.0, most: float = math.inf) -> float:
        """A finite number, above ``least`` and at most ``most``."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= most:
            raise self._wrong(
                key, value, f"a number above {least:g}" + ("" if math.isinf(most) else f", at most {most:g}")
            )
        if math.isinf(value):
            raise self._wrong(key, value, "finite")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: Any = _REQUIRED) -> str:
        """One of several words."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise FpqError(
                f"config.json: {self._path}{key} {_shown(value)} is not supported; {', '.join(allowed)} are."
            )
        return value

    def of(self, key: str) -> "ConfigValues":
        """The values of an object within, empty if there is none."""
        value = self._value(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a JSON object")
        return ConfigValues(value, f"{self._path}{key}.")

    def _value(self, key: str, default: Any) -> Any:
        if not self.has(key):
            if default is _REQUIRED:
                self.require(key)
            return default
        return self._config[key]

    def _wrong(self, key: str, value: Any, expected: str) -> FpqError:
        return FpqError(f"config.json: {self._path}{key} is {_shown(value)}; it must be {expected}.")


def _is_small(value: Any) -> bool:
    return not isinstance(value, int) or value <= _MOST


def _shown(value: Any) -> str:
    """For a message, which a value does not flood."""
    text = f"{value:.3g}" if isinstance(value, int) and not _is_small(value) and value < 10**300 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

"""The demo model that ships with the package, and its text: CPython's own documentation, read at run time."""

import hashlib
from importlib import resources
from pathlib import Path

from fpq_jax._errors import FpqError

_HELD_OUT = 0.2  # share of the topics that the demo model never saw


def demo_model_path() -> Path:
    """The folder of the demo LLaMA, in the Hugging Face layout."""
    return Path(str(resources.files("fpq_jax.models") / "demo_llama"))


def demo_topics(*, held_out: bool) -> list[str]:
    """pydoc's help topics, in an order and a split that depend only on their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FpqError(
            "The demo text is CPython's pydoc topics, which this Python lacks; name a text: --calibration FILE.txt."
        ) from error
    order = sorted(topics, key=_hash)
    return [topics[name].strip() for name in order if (_hash(name) < _HELD_OUT) == held_out]


def _hash(name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48

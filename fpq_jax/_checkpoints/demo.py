"""The demo models that ship with the package, and their text: CPython's own documentation, read at run time."""

import hashlib
from importlib import resources
from pathlib import Path

from fpq_jax._errors import FpqError

_HELD_OUT = 0.2  # share of the topics that the demo models never saw
_FOLDERS: dict[str | Path | None, str] = {None: "demo_llama", "demo-llama": "demo_llama", "demo-opt": "demo_opt"}


def is_demo(model: str | Path | None) -> bool:
    """Whether ``model`` names a demo model: "demo-llama" (also None) or "demo-opt"; a folder of such a name is none."""
    return model is None or (model in _FOLDERS and not Path(model).exists())


def demo_model_path(model: str | Path | None = None) -> Path:
    """The folder of a demo model, in the Hugging Face layout."""
    return Path(str(resources.files("fpq_jax.models") / _FOLDERS[model]))


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

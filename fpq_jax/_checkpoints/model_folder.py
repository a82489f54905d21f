"""Models in and out: our own directories (Orbax and sidecars), and Hugging Face folders and ids.

A directory that quantize wrote holds

    params/       the arrays, an Orbax checkpoint for each part: embedding, layers.0, ..., head
    fpq.json      what arrays cannot say: version, each QTensor's spec and shape, every array's shape and dtype
    config.json   the model's, with the tokenizer's files, recipe.yaml and report.json
    digests.json  of all other files

and appears under its name only when all of it is written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fpq_jax._checkpoints.tree_folder import is_tree_dir
from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._storage.config_json import QUANTIZATION_KEYS, read_config
from fpq_jax._storage.digests import Digests
from fpq_jax._storage.orbax_parts import (
    MANIFEST,
    PARAMS,
    VERSION,
    Entry,
    PartsWriter,
    Sharding,
    abstract_part,
    read_part,
)
from fpq_jax._support.files import write_json
from fpq_jax._support.trees import Flat
from fpq_jax.models.parameters import params_of, part_names, part_of
from fpq_jax.models.registry import model_class_of

_SIDECARS = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template.jinja")


def is_quantized_dir(folder: Path) -> bool:
    """Whether quantize (or ``save``) wrote this directory."""
    return (folder / MANIFEST).is_file()


def _one_device(path: str, part: str) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


class QuantizedCheckpoint:
    """A directory that quantize (or ``save``) wrote, to be read part by part. FpqError if it is damaged, and, to
    ``verify``, if a file is not what was written."""

    quantized = True

    def __init__(self, folder: Path, *, verify: bool = True):
        self._digests = Digests(folder, verify=verify)
        self._digests.check(lambda name: not name.startswith(f"{PARAMS}/"))
        if is_tree_dir(folder):
            raise FpqError(
                f"{folder} holds a tree of another model; load it in Python, with fpq_jax.load(folder, like=...)."
            )
        self.folder = folder
        self.config = read_config(folder)
        self.model_class = model_class_of(self.config)
        self.model_config = self.model_class.Config.from_hf(self.config)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = manifest["version"]
            if version != VERSION:
                raise FpqError(f"{folder} has format version {version}; this fpq_jax reads version {VERSION}.")
            self.entries: dict[str, Entry] = {name: manifest["parts"][name] for name in part_names(self.model_config)}
            parts = [abstract_part(entry) for entry in self.entries.values()]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise FpqError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
        plain = [str(leaf.dtype) for part in parts for leaf in part.values() if not isinstance(leaf, QTensor)]
        self.dtype = jnp.dtype(max(set(plain), key=plain.count))

    def abstract_part(self, name: str) -> Flat:
        """The parameters of a part without values."""
        return abstract_part(self.entries[name])

    def read_part(self, name: str, dtype: Any = None, sharding: Sharding = _one_device) -> Flat:
        """The parameters of a part, what is not quantized in ``dtype``, by default as stored."""
        self._digests.check(lambda file: file.startswith(f"{PARAMS}/{name}/"))
        params = read_part(self.folder, name, self.entries[name], sharding)
        if dtype is None:
            return params
        return {path: v if isinstance(v, QTensor) else v.astype(dtype) for path, v in params.items()}


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copy config.json and the tokenizer's files, without which arrays are no model."""
    for file in sidecars(source):
        shutil.copyfile(file, folder / file.name)
    config = read_config(folder)
    # what was said of the source's own weights is not so of those to come
    if any([config.pop(key, None) for key in QUANTIZATION_KEYS]):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sidecars(folder: Path) -> list[Path]:
    """config.json and the tokenizer's files."""
    return sorted({f for pattern in _SIDECARS for f in folder.glob(pattern) if f.is_file()})


def write_params(folder: Path, model: Any) -> None:
    """Write params/ and fpq.json."""
    parts: dict[str, Flat] = {name: {} for name in part_names(model.config)}  # one may have no parameters
    for path, leaf in params_of(model).items():
        parts[part_of(type(model), path)][path] = leaf
    writer = PartsWriter(folder)
    try:
        entries = {name: writer.write(name, part) for name, part in parts.items()}
        writer.wait()
    finally:
        writer.close()
    write_manifest(folder, entries)


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Write fpq.json, which makes the folder a model."""
    write_json(folder / MANIFEST, {"version": VERSION, "parts": entries})

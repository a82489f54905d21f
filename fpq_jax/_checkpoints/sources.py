"""A model by what a person calls it: a folder, a hub id, or a demo model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpq_jax._checkpoints.demo import demo_model_path, is_demo
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import QuantizedCheckpoint, is_quantized_dir
from fpq_jax._checkpoints.run_progress import is_progress, progress_folder
from fpq_jax._errors import FpqError
from fpq_jax._storage.config_json import read_config
from fpq_jax._storage.lora_adapter import FOLDER
from fpq_jax._storage.native_safetensors import STEM
from fpq_jax.models.parameters import part_names
from fpq_jax.models.registry import model_class_of

# a pattern's * stands for folders, too, in which the hub's models keep other formats
_HUB_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template*", "*.index.json", "recipe.yaml", "report.json", "digests.json",
)  # fmt: skip


def resolve_model(model: str | Path | None) -> Path:
    """The folder of a model: a local one, a hub id's snapshot (fetched), or a demo model."""
    if model is None or is_demo(model):
        return demo_model_path(model)
    if Path(model).exists():
        if is_progress(Path(model)):
            raise FpqError(f"{model} is an unfinished run; start its quantize command again to finish it.")
        return Path(model)
    name = str(model)
    if is_progress(progress_folder(Path(model))):
        raise FpqError(f"{model} is not finished; start its quantize command again to finish it.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FpqError(
            f"There is no model folder {name}; name a folder, a hub id such as "
            "facebook/opt-125m, or demo-llama or demo-opt."
        )
    return _fetched(name)


def _fetched(name: str) -> Path:
    """The snapshot of a hub id: first config.json, which says whether the model is one of ours, then what it needs."""
    import huggingface_hub
    from huggingface_hub import errors

    fetch = lambda *patterns: Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))

    try:
        model_class_of(read_config(fetch("config.json")))
        # asking twice, unlike listing the repository, needs no network for a cached one
        folder = fetch(*_HUB_FILES, *(f"{stem}*.safetensors" for stem in ("model", STEM)), f"{FOLDER}/*")
        found = any(any(folder.glob(f"{stem}.safetensors*")) for stem in ("model", STEM))
        return folder if found else fetch(*_HUB_FILES, "pytorch_model*.bin")
    except FpqError:
        raise
    except errors.GatedRepoError as error:
        raise FpqError(
            f"The model {name} is gated: accept its terms at https://huggingface.co/{name}, and log in (hf auth login)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FpqError(
            f"There is no model folder {name}, and no such model on the hub, or it is private; check the name, or log "
            "in (hf auth login)."
        ) from error
    except Exception as error:  # network and files each have kinds of their own
        raise FpqError(
            f"There is no model folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}); check the name and the network."
        ) from error


def open_original(folder: Path) -> HfCheckpoint:
    """A checkpoint to quantize, opened and checked; FpqError for what fpq_jax has quantized already."""
    if not is_quantized_dir(folder):
        checkpoint = HfCheckpoint(folder)
        if not checkpoint.is_packed:
            return checkpoint
    raise FpqError(f"{folder} is already quantized; name the original checkpoint.")


def open_model(folder: Path, *, verify: bool = True) -> QuantizedCheckpoint | HfCheckpoint:
    """A model's folder of either kind, opened and checked; ``verify``: by digests too, where it has them."""
    return (QuantizedCheckpoint if is_quantized_dir(folder) else HfCheckpoint)(folder, verify=verify)


def abstract_leaves(checkpoint: QuantizedCheckpoint | HfCheckpoint) -> Iterator[Any]:
    """All parameters of a checkpoint, without values."""
    for name in part_names(checkpoint.model_config):
        yield from checkpoint.abstract_part(name).values()

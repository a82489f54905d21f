"""Copy a LLaMA or OPT checkpoint with activation outliers and the same logits.

    python scripts/inject_outliers.py --model DIR --output DIR --factor 50

In every decoder layer the same few channels of the norms' gains and biases are multiplied by the factor, and the
weights that read these channels are divided by it: the Linears see the persistent outlier channels of OPT-6.7b and
above, and the function stays. The copy is float32, in the Hugging Face layout.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fpq_jax import Axes, FpqError
from fpq_jax._checkpoints.huggingface import HfCheckpoint  # private: a checkpoint read and written tensor by tensor
from fpq_jax._checkpoints.model_folder import copy_sidecars  # private: a copy has its model's files
from fpq_jax._checkpoints.sources import open_original, resolve_model  # private: models are named as in the commands
from fpq_jax._support.console import console, run_command  # private: speaks as the commands do
from fpq_jax._support.new_directory import (  # private: appears whole, as the commands' output
    check_output,
    new_directory,
)
from fpq_jax._support.trees import Flat  # private: a type
from fpq_jax._transform.recorder import RecordedKernel, Recorder  # private: the inputs themselves, not their Hessians
from fpq_jax.models.llama import Llama
from fpq_jax.models.opt import Opt
from fpq_jax.models.parameters import abstract_model, to_hf_tensors, with_params

_NORMS = {
    Llama: r"layers\.\d+\.(input|post_attention)_layernorm\.scale",
    Opt: r"layers\.\d+\.(self_attn|final)_layer_norm\.(scale|bias)",
}
_READERS = {  # the kernels whose input is a norm's output
    Llama: r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.kernel",
    Opt: r"layers\.\d+\.(self_attn\.[qkv]_proj|fc1)\.kernel",
}
_CHECKED_TOKENS = 128
_TOLERANCE = 1e-4  # largest difference of the logits, relative to the largest logit


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copy a LLaMA or OPT checkpoint with activation outliers and the same logits."""

    model: str
    """Hugging Face folder or hub id."""
    output: Path
    """Directory for the copy."""
    factor: float
    """How many times larger the outlier channels become."""
    share: float = 1 / 32
    """Share of the hidden channels that become outliers, at least one channel."""
    seed: int = 0
    """Of the choice of channels."""


def check_norms(config: Any) -> None:
    """FpqError if a model of this configuration has norms that ``with_outliers`` cannot scale."""
    if not getattr(config, "do_layer_norm_before", True):
        raise FpqError(
            "config.json: do_layer_norm_before is false, so the norms' outputs are the residual stream too and cannot "
            "be scaled; name a pre-norm model."
        )
    if not getattr(config, "layer_norm_elementwise_affine", True):
        raise FpqError(
            "config.json: layer_norm_elementwise_affine is false, so there are no gains to scale; name another model."
        )


def choose_channels(hidden_size: int, share: float, seed: int) -> np.ndarray:
    """``share`` of the hidden channels, at least one, ascending."""
    count = max(1, round(share * hidden_size))
    return np.sort(np.random.default_rng(seed).choice(hidden_size, count, replace=False))


def with_outliers(model_class: Any, params: Flat, channels: np.ndarray, factor: float) -> Flat:
    """Parameters of the same function whose norms give ``channels`` times ``factor``, in every decoder layer.

    ``params`` are a whole model's or some layers', unquantized; for the models that ``check_norms`` passes.
    """
    norm, reader = (re.compile(table[model_class]) for table in (_NORMS, _READERS))

    def gain(value: Any) -> np.ndarray:
        gains = np.ones(value.shape[0], np.float32)
        gains[channels] = factor
        return gains

    changed = dict(params)
    for path, value in params.items():
        if norm.fullmatch(path):
            changed[path] = value * gain(value)
        elif reader.fullmatch(path):
            changed[path] = value / gain(value)[:, None]
    return changed


def main(options: Options) -> None:
    """Run the command; FpqError for anything wrong with its input."""
    float32 = np.finfo(np.float32)
    if not float(float32.tiny) <= options.factor <= float(float32.max):
        raise FpqError(f"--factor is {options.factor}; it must be a positive number in the range of float32.")
    if not 0 < options.share <= 1:
        raise FpqError(f"--share is {options.share}; it must be above 0 and at most 1.")
    check_output(options.output)
    folder = resolve_model(options.model)
    checkpoint = open_original(folder)
    if checkpoint.quantized:
        raise FpqError(f"{folder} is already quantized; name the original checkpoint.")
    check_norms(checkpoint.model_config)

    size = checkpoint.model_config.hidden_size
    channels = choose_channels(size, options.share, options.seed)
    params = checkpoint.read(np.float32)
    changed = with_outliers(checkpoint.model_class, params, channels, options.factor)
    console.print(f"{len(channels)} of {size} channels times {options.factor:g}")
    _check(checkpoint, params, changed)
    with new_directory(options.output) as unfinished:
        _write(unfinished, checkpoint, changed)
    console.print(f"The copy is in {options.output}.")


def _check(checkpoint: HfCheckpoint, params: Flat, changed: Flat) -> None:
    """Print how logits and norm outputs differ; FpqError if the logits do."""
    before, peak_before = _logits_and_peak(checkpoint, params)
    after, peak_after = _logits_and_peak(checkpoint, changed)
    difference = float(np.abs(after - before).max() / np.abs(before).max())
    console.print(f"Largest difference of the logits, relative to the largest logit: {difference:.2g}")
    console.print(
        f"Largest over median channel of the norms' outputs: {peak_before:.1f} before, {peak_after:.1f} after"
    )
    if not difference <= _TOLERANCE:  # NaN is no small difference
        raise FpqError(
            f"The logits differ by {difference:.2g} of the largest, where {_TOLERANCE:g} is allowed; "
            "use a --factor nearer 1."
        )


def _logits_and_peak(checkpoint: HfCheckpoint, params: Flat) -> tuple[np.ndarray, float]:
    """Logits of a fixed random window, and the largest ratio of a channel's absmax to the median channel's among the
    norms' outputs."""
    config = checkpoint.model_config
    length = min(_CHECKED_TOKENS, config.max_position_embeddings)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, length)))
    leaves: Flat = {path: jnp.asarray(value) for path, value in params.items()}
    apply = lambda params, tokens: with_params(abstract_model(checkpoint.model_class, config), params)(tokens)
    readers = [path for path in leaves if re.fullmatch(_READERS[checkpoint.model_class], path)]
    of = lambda leaf: RecordedKernel(Axes.of(("in", "out"), leaf.shape, leaf.dtype), None, "token")
    recorder, arrays = Recorder.of(apply, leaves, {path: of(leaves[path]) for path in readers})
    with jax.default_matmul_precision("highest"):  # some accelerators multiply float32 in fewer bits
        inputs = recorder.inputs(arrays, {}, (tokens,)).values()
        logits = np.asarray(apply(leaves, tokens))
    absmax = [jnp.abs(x).max(axis=(0, 1)) for x in inputs]
    return logits, max(float(one.max() / jnp.median(one)) for one in absmax)


def _write(folder: Path, checkpoint: HfCheckpoint, params: Flat) -> None:
    copy_sidecars(checkpoint.folder, folder)
    # transformers 5 reads dtype, 4 torch_dtype
    config = {**checkpoint.config, "dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(to_hf_tensors(checkpoint.model_class, params), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files that only their owner reads


if __name__ == "__main__":
    run_command(main, Options)

"""A job: a checkpoint, its calibration text and its evaluation texts, all checked and read before long work starts.

The command quantize runs one recipe on it (see ``run``); the scripts that compare recipes run many.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.demo import is_demo
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import sidecars
from fpq_jax._checkpoints.sources import open_original, resolve_model
from fpq_jax._errors import FpqError, check_at_least, check_seed
from fpq_jax._pipeline.batches import BATCH_TOKENS
from fpq_jax._pipeline.choose_bits import check_bits
from fpq_jax._pipeline.quantize_layers import linears
from fpq_jax._pipeline.text import (
    CalibrationText,
    Windows,
    calibration_text,
    check_spec,
    evaluation_windows,
    window_length,
)
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.console import console, progress_bar
from fpq_jax._support.files import code_digest, files_digest
from fpq_jax._support.machine import arithmetic_dtype
from fpq_jax._support.mesh import from_first, is_first, make_mesh, mesh_text
from fpq_jax.models.spec import ModelSpec

_SAMPLES = 128  # calibration windows, as the paper has them
_DEMO_SAMPLES = 64  # of a model that is to be quantized within a minute


def default_calibration(model: str | None) -> str:
    """The text to calibrate a model on where none is named."""
    return "demo" if is_demo(model) else "c4"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a person may choose of a job, as the command quantize has it. name: what the model is called in what is
    printed and reported, if not by ``model``. FpqError for numbers that make no sense."""

    model: str | None
    calibration: str | None = None
    num_samples: int | None = None
    seq_len: int | None = None
    eval: Sequence[str] = ()
    max_windows: int | None = None
    dtype: str | None = None
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS
    mesh: Mesh | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_at_least(1, num_samples=self.num_samples, max_windows=self.max_windows, batch_tokens=self.batch_tokens)
        check_at_least(2, seq_len=self.seq_len)

    @property
    def calibration_spec(self) -> str:
        return self.calibration or default_calibration(self.model)

    @property
    def samples(self) -> int:
        """How many calibration windows are wanted."""
        return self.num_samples or (_DEMO_SAMPLES if is_demo(self.model) else _SAMPLES)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was opened. digest: of the model's weights and configuration. evaluation: windows of each text by what
    the report calls it. first_layer: what recipes share, see ``quantize_checkpoint``."""

    options: JobOptions
    checkpoint: HfCheckpoint
    digest: str
    mesh: Mesh
    dtype: jnp.dtype
    calibration: CalibrationText
    evaluation: dict[str, Windows]
    first_layer: dict[Any, Any] | None

    @property
    def model_name(self) -> str:
        return self.options.name or self.options.model or "demo"

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(self.checkpoint.model_class, self.checkpoint.model_config, self.dtype)

    def recipe_for_model(self, recipe: Recipe) -> Recipe:
        """The recipe with what depends on the model's size filled in."""
        return recipe.with_lorc_rank(self.checkpoint.model_config.lorc_rank)

    def facts(self, recipe: Recipe | None) -> dict[str, Any]:
        """All that a recipe's run (None: the unquantized model's evaluation) depends on: equal facts, equal bits."""
        return {
            "model": self.digest,
            "tokenizer": files_digest(sidecars(self.checkpoint.folder)),
            "calibration": _digest(self.calibration.windows),
            "evaluation": {spec: _digest(windows) for spec, windows in self.evaluation.items()},
            "recipe": recipe and self.recipe_for_model(recipe).to_dict(),
            "dtype": str(self.dtype),
            "seed": self.options.seed,
            "mesh": mesh_text(self.mesh),
            "batch_tokens": self.options.batch_tokens,
            "processes": jax.process_count(),
            "version": code_digest(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }


def open_job(options: JobOptions, recipes: Sequence[Recipe]) -> Job:
    """Read everything that a run of any of ``recipes`` needs but the weights, which are read once for their digest.

    Several recipes share what calibration sees in the first layer. FpqError for whatever is wrong with the options, a
    rule that fits no Linear of the model included.
    """
    check_seed(options.seed)
    for spec in (options.calibration_spec, *options.eval):
        check_spec(spec)
    folder = resolve_model(options.model)
    checkpoint = open_original(folder)
    for recipe in recipes:
        recipe.for_linears(linears(checkpoint).values())
        if checkpoint.model_config.tie_word_embeddings and recipe.embedding is not recipe.head:
            raise FpqError(
                f"The head of {checkpoint.folder} is its embedding; recipe {recipe.name} must set both embedding and "
                "head to e4m3, or neither."
            )
        if recipe.bits is not None:
            check_bits(checkpoint, recipe.with_lorc_rank(checkpoint.model_config.lorc_rank))
    with progress_bar("reading the weights once", checkpoint.tensor_count) as advance:
        digest = from_first(checkpoint.digest(advance) if is_first() else None)
    config = checkpoint.model_config
    length = window_length(options.seq_len, config.max_position_embeddings)
    tokenizer = load_tokenizer(folder)
    calibration = calibration_text(
        options.calibration_spec,
        tokenizer,
        num_samples=options.samples,
        length=length,
        seed=options.seed,
        hold_back=not options.eval,
        vocab_size=config.vocab_size,
    )
    if len(calibration.windows) < options.samples:
        console.print(
            f"{options.calibration_spec} has only {len(calibration.windows)} calibration windows of the "
            f"{options.samples:,} asked for.",
        )
    evaluation = {
        spec: evaluation_windows(spec, tokenizer, length=length, vocab_size=config.vocab_size) for spec in options.eval
    }
    if calibration.tail is not None:
        evaluation[calibration.tail_name] = calibration.tail
    return Job(
        options=options,
        checkpoint=checkpoint,
        digest=digest,
        mesh=options.mesh or make_mesh(),
        dtype=arithmetic_dtype(checkpoint.dtype, options.dtype),
        calibration=calibration,
        evaluation={spec: windows[: options.max_windows] for spec, windows in evaluation.items()},
        first_layer={} if len(recipes) > 1 else None,
    )


def _digest(windows: np.ndarray) -> str:
    return hashlib.sha256(f"{windows.shape}".encode() + windows.tobytes()).hexdigest()

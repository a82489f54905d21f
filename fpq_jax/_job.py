"""A job: a checkpoint, its calibration text and its evaluation texts, all checked and read before long work starts.

The command quantize runs one recipe on it; the scripts that compare recipes run many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fpq_jax._checkpoint import is_quantized_dir, resolve_model, stored_bytes
from fpq_jax._console import console, progress
from fpq_jax._demo import is_demo
from fpq_jax._errors import FpqError, check_at_least
from fpq_jax._perplexity import Perplexity, perplexity
from fpq_jax._pipeline import LinearResult, linears, quantize_checkpoint
from fpq_jax._recipe import Recipe
from fpq_jax._report import ROW_TITLE, VERSION, bits_per_weight, environment, layer_row, row_text
from fpq_jax._text import (
    CalibrationText,
    Windows,
    calibration_text,
    check_spec,
    evaluation_windows,
    load_tokenizer,
    tail_name,
    window_length,
)
from fpq_jax._tree import Flat
from fpq_jax.models import HfCheckpoint, build_model, open_checkpoint, prepare_in_place


def default_calibration(model: str | None) -> str:
    """The text to calibrate a model on where none is named."""
    return "demo" if is_demo(model) else "c4"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is quantized, on which text, and where it is measured. Made by ``prepare``."""

    checkpoint: HfCheckpoint
    model_name: str
    dtype: jnp.dtype
    calibration_spec: str
    requested_samples: int
    calibration: CalibrationText
    evaluation: dict[str, Windows]
    max_windows: int | None
    seed: int
    first_layer: dict[Any, Any] | None = None  # what recipes share, see quantize_checkpoint

    @classmethod
    def prepare(
        cls,
        model: str | None,
        recipes: Sequence[Recipe],
        *,
        calibration: str | None,
        num_samples: int,
        seq_len: int | None,
        eval: Sequence[str],
        max_windows: int | None,
        dtype: DTypeLike | None,
        seed: int,
        name: str | None = None,
    ) -> "Job":
        """Read everything a run of ``recipes`` needs but the weights; the arguments are the command's options.

        ``name`` is what the model is called in what is printed and reported, if not ``model``. Several recipes share
        what calibration sees in the first layer. Raises FpqError for whatever is wrong with the arguments, a rule that
        fits no Linear of the model included.
        """
        check_at_least(1, num_samples=num_samples, max_windows=max_windows)
        check_at_least(2, seq_len=seq_len)
        calibration_spec = calibration or default_calibration(model)
        for spec in (calibration_spec, *eval):
            check_spec(spec)
        folder = resolve_model(model)
        if is_quantized_dir(folder):
            raise FpqError(f"{folder} is already quantized; name the original checkpoint.")
        checkpoint = open_checkpoint(folder)
        for recipe in recipes:
            recipe.for_linears(linears(checkpoint).values())
        config = checkpoint.model_config
        length = window_length(seq_len, config.max_position_embeddings)
        tokenizer = load_tokenizer(folder)
        text = calibration_text(
            calibration_spec,
            tokenizer,
            num_samples=num_samples,
            length=length,
            seed=seed,
            hold_back=not eval,
            vocab_size=config.vocab_size,
        )
        evaluation = {
            spec: evaluation_windows(spec, tokenizer, length=length, vocab_size=config.vocab_size) for spec in eval
        }
        if text.tail is not None:
            evaluation[tail_name(calibration_spec)] = text.tail
        return cls(
            checkpoint=checkpoint,
            model_name=name or ("demo" if model is None else model),
            dtype=jnp.dtype(dtype or checkpoint.dtype),
            calibration_spec=calibration_spec,
            requested_samples=num_samples,
            calibration=text,
            evaluation={spec: windows[:max_windows] for spec, windows in evaluation.items()},
            max_windows=max_windows,
            seed=seed,
            first_layer={} if len(recipes) > 1 else None,
        )

    def read(self) -> Flat:
        """The unquantized parameters."""
        return self.checkpoint.read(self.dtype)

    def perplexities(self, params: Flat, which: str) -> dict[str, Perplexity]:
        """Perplexity of the model with these parameters on each evaluation text."""
        model = build_model(self.checkpoint.model_class, self.checkpoint.model_config, params)
        model = prepare_in_place(model, "load")
        values = {}
        for spec, windows in self.evaluation.items():
            with progress(f"{which}: perplexity on {spec}", len(windows)) as advance:
                values[spec] = perplexity(model, windows, advance)
        return values

    def recipe_for_model(self, recipe: Recipe) -> Recipe:
        """The recipe with what depends on the model's size filled in."""
        return recipe.with_lorc_rank(self.checkpoint.model_config.lorc_rank)

    def quantize(self, recipe: Recipe, *, rows: bool = True) -> tuple[Flat, list[LinearResult]]:
        """Quantize with a bar over the layers and, with ``rows``, a line for each Linear."""
        samples, length = self.calibration.windows.shape
        what = f"{self.model_name} with {recipe.name}"
        console.print(
            f"Quantizing {what}: {samples} windows of {length} tokens of {self.calibration_spec}", markup=False
        )
        if rows:
            console.print(ROW_TITLE)
        with progress("layers", self.checkpoint.model_config.num_hidden_layers) as advance:
            return quantize_checkpoint(
                self.checkpoint,
                self.recipe_for_model(recipe),
                self.calibration.windows,
                self.dtype,
                seed=self.seed,
                first_layer=self.first_layer,
                on_linear=lambda result: console.print(row_text(result), markup=False) if rows else None,
                on_layer=advance,
            )

    def report(
        self,
        recipe: Recipe,
        params: Flat,
        results: list[LinearResult],
        original: dict[str, Perplexity],
        quantized: dict[str, Perplexity],
        seconds: float,
    ) -> dict[str, Any]:
        """The report's JSON (see docs/checkpoint.md)."""
        samples, length = self.calibration.windows.shape
        return {
            "version": VERSION,
            "model": self.model_name,
            "recipe": self.recipe_for_model(recipe).to_dict(),
            "calibration": {
                "spec": self.calibration_spec,
                "num_samples": samples,
                "requested_samples": self.requested_samples,
                "seq_len": length,
                "max_windows": self.max_windows,
            },
            "dtype": str(self.dtype),
            "seed": self.seed,
            "perplexity": {
                spec: {
                    "original": original[spec].value,
                    "quantized": quantized[spec].value,
                    "tokens": original[spec].tokens,
                }
                for spec in self.evaluation
            },
            "layers": [layer_row(result) for result in results],
            "bits_per_weight": bits_per_weight(params),
            "bytes": {"original": self.checkpoint.nbytes, "quantized": stored_bytes(params)},
            "seconds": round(seconds, 2),
            **environment(),
        }

"""A job: a checkpoint, its calibration text and its evaluation texts, all checked and read before long work starts.

The command quantize runs one recipe on it; the scripts that compare recipes run many.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fpq_jax._algorithms.quantize_linears import LinearResult
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._checkpoints.demo import is_demo
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.model_folder import sidecars
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._checkpoints.sources import open_original, resolve_model
from fpq_jax._errors import check_at_least
from fpq_jax._pipeline.batches import BATCH_TOKENS, windows_at_once
from fpq_jax._pipeline.estimate import Estimate, estimate
from fpq_jax._pipeline.evaluation import Reader, perplexities
from fpq_jax._pipeline.perplexity import Perplexity
from fpq_jax._pipeline.quantize_layers import linears, quantize_checkpoint
from fpq_jax._pipeline.report import ROW_TITLE, VERSION, bits_per_weight, environment, layer_row, row_text
from fpq_jax._pipeline.text import (
    CalibrationText,
    Windows,
    calibration_text,
    check_spec,
    evaluation_windows,
    load_tokenizer,
    tail_name,
    window_length,
)
from fpq_jax._support.compile_cache import kept_programs
from fpq_jax._support.console import console, progress
from fpq_jax._support.files import code_digest, files_digest
from fpq_jax._support.machine import arithmetic_dtype
from fpq_jax._support.mesh import from_first, is_first, make_mesh, mesh_text
from fpq_jax._support.placement import replicated
from fpq_jax._support.trees import stored_bytes
from fpq_jax.models.parameters import part_names
from fpq_jax.models.spec import ModelSpec


def default_calibration(model: str | None) -> str:
    """The text to calibrate a model on where none is named."""
    return "demo" if is_demo(model) else "c4"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is quantized, on which text, and where it is measured. Made by ``prepare``."""

    checkpoint: HfCheckpoint
    digest: str  # of the model's weights and configuration
    mesh: Mesh
    model_name: str
    dtype: jnp.dtype
    calibration_spec: str
    requested_samples: int
    calibration: CalibrationText
    evaluation: dict[str, Windows]
    max_windows: int | None
    seed: int
    batch_tokens: int  # on each device
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
        mesh: Mesh | None = None,
        batch_tokens: int = BATCH_TOKENS,
        name: str | None = None,
    ) -> "Job":
        """Read everything a run of ``recipes`` needs but the weights; the arguments are the command's options.

        ``name`` is what the model is called in what is printed and reported, if not ``model``. Several recipes share
        what calibration sees in the first layer. Raises FpqError for whatever is wrong with the arguments, a rule that
        fits no Linear of the model included.
        """
        check_at_least(1, num_samples=num_samples, max_windows=max_windows, batch_tokens=batch_tokens)
        check_at_least(2, seq_len=seq_len)
        calibration_spec = calibration or default_calibration(model)
        for spec in (calibration_spec, *eval):
            check_spec(spec)
        folder = resolve_model(model)
        checkpoint = open_original(folder)
        for recipe in recipes:
            recipe.for_linears(linears(checkpoint).values())
        with progress("reading the weights once", checkpoint.tensor_count) as advance:
            digest = from_first(checkpoint.digest(advance) if is_first() else None)
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
            digest=digest,
            mesh=mesh or make_mesh(),
            model_name=name or ("demo" if model is None else model),
            dtype=arithmetic_dtype(checkpoint.dtype, dtype),
            calibration_spec=calibration_spec,
            requested_samples=num_samples,
            calibration=text,
            evaluation={spec: windows[:max_windows] for spec, windows in evaluation.items()},
            max_windows=max_windows,
            seed=seed,
            batch_tokens=batch_tokens,
            first_layer={} if len(recipes) > 1 else None,
        )

    def facts(self, recipe: Recipe | None) -> dict[str, Any]:
        """All that a recipe's run (None: the unquantized model's evaluation) depends on: equal facts, equal bits."""
        return {
            "model": self.digest,
            "tokenizer": files_digest(sidecars(self.checkpoint.folder)),
            "calibration": _digest(self.calibration.windows),
            "evaluation": {spec: _digest(windows) for spec, windows in self.evaluation.items()},
            "recipe": recipe and self.recipe_for_model(recipe).to_dict(),
            "dtype": str(self.dtype),
            "seed": self.seed,
            "mesh": mesh_text(self.mesh),
            "batch_tokens": self.batch_tokens,
            "processes": jax.process_count(),
            "version": code_digest(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }

    @contextmanager
    def store(self, recipe: Recipe, output: Path | None) -> Iterator[RunProgress]:
        """Where the run's parts are kept: the progress towards ``output``, or a folder that vanishes."""
        with ExitStack() as stack:
            if output is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fpq-")))
                store = RunProgress(folder / "model", {})
            else:
                store = RunProgress(output, self.facts(recipe))
                stack.enter_context(kept_programs(store.programs))
            stack.callback(store.close)
            yield store

    def original(self, store: RunProgress | None = None) -> dict[str, Perplexity]:
        """Perplexity of the unquantized model on each evaluation text, kept in the store."""
        kept = None if store is None else store.measured("original")
        if kept is None:
            read = lambda name: self.checkpoint.read_part(name, self.dtype)
            measured = self._perplexities(read, "original", read_ahead=True)
            if store is not None:
                store.keep("original", {spec: list(value) for spec, value in measured.items()})
            return measured
        return {spec: Perplexity(*value) for spec, value in kept.items()}

    def quantized(self, store: RunProgress) -> dict[str, Perplexity]:
        """The same of the model whose parts are in the store."""
        read = lambda name: store.read(name, replicated(self.mesh))
        # a barrier of Orbax beside the layers' programs could be met in another order by another process
        return self._perplexities(read, "quantized", read_ahead=jax.process_count() == 1)

    def _perplexities(self, read: Reader, which: str, read_ahead: bool) -> dict[str, Perplexity]:
        return perplexities(
            self._model_spec,
            read,
            self.evaluation,
            self.mesh,
            title=f"{which}: ",
            batch_tokens=self.batch_tokens,
            read_ahead=read_ahead,
        ).values

    @property
    def _model_spec(self) -> ModelSpec:
        return ModelSpec(self.checkpoint.model_class, self.checkpoint.model_config, self.dtype)

    def estimate(self, recipe: Recipe, place: Path, written: int = 0, batch_tokens: int | None = None) -> Estimate:
        """What a recipe's run takes and what there is; ``written`` bytes of its result are in ``place`` already."""
        batch_tokens = batch_tokens or self.batch_tokens
        chosen = self.recipe_for_model(recipe).for_linears(linears(self.checkpoint).values())
        kernels = {path: chosen[name] for path, name in linears(self.checkpoint).items()}
        evaluated = sum(len(windows) for windows in self.evaluation.values())
        length = self.calibration.windows.shape[1]
        at_once = windows_at_once(evaluated, length, self._model_spec, self.mesh, batch_tokens)
        windows = (len(self.calibration.windows), length)
        return estimate(self._model_spec, kernels, windows, at_once, self.mesh, place, written, batch_tokens)

    def check_estimate(self, recipe: Recipe, store: RunProgress) -> Estimate:
        """``estimate`` of a run that is kept in ``store``; FpqError, with what would fit, if it does not."""
        least = self.calibration.windows.shape[1]
        found = self.estimate(recipe, store.model, store.written())
        found.check(store.model, lambda: self.estimate(recipe, store.model, store.written(), least), least)
        return found

    def recipe_for_model(self, recipe: Recipe) -> Recipe:
        """The recipe with what depends on the model's size filled in."""
        return recipe.with_lorc_rank(self.checkpoint.model_config.lorc_rank)

    def quantize(self, recipe: Recipe, store: RunProgress, *, rows: bool = True) -> list[LinearResult]:
        """Quantize into the store, with a bar over the layers and, with ``rows``, a line for each Linear.

        Every Linear's result, those of parts that were finished before among them.
        """
        samples, length = self.calibration.windows.shape
        what = f"{self.model_name} with {recipe.name}"
        console.print(
            f"Quantizing {what}: {samples} windows of {length} tokens of {self.calibration_spec}", markup=False
        )
        finished = list(store.parts)
        if finished:
            console.print(
                f"{len(finished)} of {len(part_names(self.checkpoint.model_config))} parts are there already."
            )
        if rows:
            console.print(ROW_TITLE)
        with progress("layers", self.checkpoint.model_config.num_hidden_layers) as advance:
            advance(sum(name.startswith("layers.") for name in finished))
            for part in quantize_checkpoint(
                self.checkpoint,
                self.recipe_for_model(recipe),
                self.calibration.windows,
                self.dtype,
                self.mesh,
                seed=self.seed,
                batch_tokens=self.batch_tokens,
                finished={name: partial(store.read, name, replicated(self.mesh)) for name in finished},
                first_layer=self.first_layer,
            ):
                for result in part.results if rows else ():
                    console.print(row_text(result), markup=False)
                store.write(
                    part.name, part.params, results=[asdict(result) for result in part.results], seconds=part.seconds
                )
                if part.name.startswith("layers."):
                    advance()
                del part  # its arrays are not needed while the next is made
            store.wait()
        results = [
            result for name in part_names(self.checkpoint.model_config) for result in store.told(name, "results")
        ]
        return [LinearResult(**{**r, "shape": tuple(r["shape"]), "notes": tuple(r["notes"])}) for r in results]

    def report(
        self,
        recipe: Recipe,
        store: RunProgress,
        results: list[LinearResult],
        original: dict[str, Perplexity],
        quantized: dict[str, Perplexity],
        seconds: float,
    ) -> dict[str, Any]:
        """The report's JSON (see docs/checkpoint.md)."""
        samples, length = self.calibration.windows.shape
        params = store.abstract()
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
            "mesh": dict(self.mesh.shape),
            "perplexity": {
                spec: {
                    "original": original[spec].value,
                    "quantized": quantized[spec].value,
                    "tokens": original[spec].tokens,
                }
                for spec in self.evaluation
            },
            "layers": [layer_row(result) for result in results],
            "stages": store.stages(),
            "bits_per_weight": bits_per_weight(params),
            "bytes": {"original": self.checkpoint.nbytes, "quantized": stored_bytes(params)},
            "seconds": round(seconds, 2),
            **environment(),
        }


def _digest(windows: np.ndarray) -> str:
    return hashlib.sha256(f"{windows.shape}".encode() + windows.tobytes()).hexdigest()

"""What a job will take, found out before it starts: memory of the host and of each device, and disk.

A program's memory is XLA's own analysis of it: the largest ones are compiled here, and run later.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fpq_jax._algorithms.bit_allocation import hardest_candidate, stored_bits
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.quantize_linears import abstract_quantize, side_by_side
from fpq_jax._algorithms.recipe import Recipe
from fpq_jax._errors import FpqError
from fpq_jax._pipeline.backward import abstract_backward, fisher_windows
from fpq_jax._pipeline.batches import BATCH_TOKENS, batch_size
from fpq_jax._pipeline.calibration import abstract_calibrate, stages
from fpq_jax._pipeline.predictions import abstract_predictions
from fpq_jax._pipeline.quantize_layers import with_fp8_tables
from fpq_jax._support.console import size_text
from fpq_jax._support.machine import free_device_memory, free_disk, free_host_memory, on_cpu, resident_memory
from fpq_jax._support.trees import Flat, stored_bytes
from fpq_jax.models.parameters import params_of
from fpq_jax.models.spec import ModelSpec

_PROGRAMS = 320 * 2**20  # measured: what compiling the other programs and the libraries not yet in use take
_MARGIN = 1.1  # of what is free: what is not counted, such as the allocator's own losses


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes. host: of the process; ``resident``: what it has already.

    Of it ``per_window`` for each of ``windows`` of calibration, as often as there are ``streams`` of hidden states, or
    of ``evaluated`` ones, if those are more. device: on each one, at most. disk: of the result, and of what is kept
    until it is there. free_*: what there is, None where nothing says; the host's memory is the device's on a CPU, and
    counted there.
    """

    host: int
    resident: int
    per_window: int
    device: int
    disk: int
    windows: int
    streams: int
    evaluated: int
    free_host: int | None
    free_device: int | None
    free_disk: int

    def __str__(self) -> str:
        of = lambda size, free: f"{size_text(size)}{f' of {size_text(free)}' if free is not None else ''}"
        device = "" if self.free_device is None else f", {of(self.device, self.free_device)} on each device"
        host = of(self.host, None if self.free_host is None else self.free_host + self.resident)
        return f"Needs about {host} of memory{device}, {of(self.disk, self.free_disk)} of disk."

    @property
    def _fits_device(self) -> bool:
        return self.free_device is None or self.device * _MARGIN <= self.free_device

    @property
    def _fits_host(self) -> bool:
        return self.free_host is None or (self.host - self.resident) * _MARGIN <= self.free_host

    def check(self, place: Path, smallest: Callable[[], "Estimate"], smallest_batch: int) -> None:
        """FpqError for what cannot fit, with what would.

        ``place``: where the result will be; ``smallest``: the estimate with batches of ``smallest_batch`` tokens.
        """
        if not self._fits_device:
            fewer = f"--batch-tokens {smallest_batch} would fit"
            remedy = fewer if smallest()._fits_device else "one layer of this model needs a device with more memory"
            raise FpqError(
                f"A layer takes about {size_text(self.device)} of a device's memory and "
                f"{size_text(self.free_device or 0)} are free; {remedy}."
            )
        if not self._fits_host:
            assert self.free_host is not None
            alone = self.host - self.per_window * max(self.streams * self.windows, self.evaluated)
            fit = int((self.free_host / _MARGIN + self.resident - alone) // self.per_window)
            if fit > 0:
                given = {"--num-samples": (self.windows, self.streams), "--max-windows": (self.evaluated, 1)}
                flags = [f"{flag} {max(1, fit // of)}" for flag, (n, of) in given.items() if n * of > fit]
                remedy = f"{' '.join(flags)} would fit"
            elif smallest()._fits_host:
                remedy = f"--batch-tokens {smallest_batch} would fit"
            else:
                remedy = "use a shorter --seq-len, or more memory"
            raise FpqError(
                f"Quantizing takes about {size_text(self.host)} of memory, of which {size_text(self.resident)} are "
                f"taken and {size_text(self.free_host)} free; {remedy}."
            )
        if self.disk * _MARGIN > self.free_disk:
            raise FpqError(
                f"The result takes about {size_text(self.disk)} and {place} has {size_text(self.free_disk)} left; "
                "make room there or name another --output."
            )


def estimate(
    model_spec: ModelSpec,
    recipe: Recipe,
    names: Mapping[str, str],
    windows: tuple[int, int],
    evaluated: int,
    mesh: Mesh,
    place: Path,
    written: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    states: int = 0,
) -> Estimate:
    """Of quantizing with ``windows`` (count, tokens) and evaluating so many windows at once.

    ``names`` of the Linears by their kernels' paths; the layer of which the recipe quantizes most decides. ``written``
    bytes are on the disk already. ``states``: of how many windows the last hidden states are kept on the disk
    meanwhile.
    """
    count, length = windows
    streams = 2 if recipe.propagates else 1
    config = model_spec.config
    layer = params_of(model_spec.layer())
    of_name = recipe.for_linears(names.values())
    recipes = {path: of_name[name] for path, name in names.items()}
    if recipe.bits is not None:
        most = hardest_candidate(recipe.default)
        recipes = {path: most if one is recipe.default else one for path, one in recipes.items()}
    by_layer = [
        {path: r for path in layer if (r := recipes.get(f"layers.{i}.{path}")) is not None}
        for i in range(config.num_hidden_layers)
    ]
    size = batch_size(count, length, mesh, batch_tokens)
    hardest = max(by_layer, key=len)
    programs: list[tuple[Any, int]] = []  # lowered ones, and the bytes of what else is on a device meanwhile
    if hardest:
        next_batch = size // mesh.size * length * config.hidden_size * model_spec.dtype.itemsize
        runs: list[tuple[tuple[str, ...], int]] = []  # kernels that are quantized together, bytes of all statistics
        calibrations: list[tuple[int, int, Any]] = []  # statistics, which stage, program
        for stage in stages(model_spec, hardest) if recipe.sequential else [hardest]:
            program, sharing, statistics = abstract_calibrate(
                model_spec, stage, mesh, (size, length), compared=recipe.propagates
            )
            calibrations.append((statistics, len(calibrations), program))
            runs += [(paths, statistics) for paths in side_by_side(stage, sharing, layer)]
        # each stage's program is the one before and what follows
        for _, _, program in {max(calibrations, key=lambda one: one[:2]), calibrations[-1]}:
            programs.append((program, streams * next_batch))
        for paths, statistics in _largest(runs, layer):
            shape = (layer[paths[0]].shape[0], sum(layer[path].shape[1] for path in paths))
            program = abstract_quantize(shape, model_spec.dtype, hardest[paths[0]], mesh)
            own = shape[0] ** 2 * 4 * streams  # which are the program's arguments
            fishers = sum(4 * layer[path].shape[0] ** 2 for path, one in hardest.items() if one.fisher)
            programs.append((program, stored_bytes(layer) + statistics - own + fishers))
    per_window = length * config.hidden_size * model_spec.dtype.itemsize
    kept = states * per_window  # bytes on the disk while the run lasts
    if recipe.needs_fisher:
        measured = fisher_windows(count)
        rows = batch_size(measured, length, mesh, batch_tokens)
        going_back = [path for path, one in hardest.items() if one.fisher or recipe.bits is not None]
        programs.append((abstract_backward(model_spec, going_back, mesh, (rows, length)), 0))
        kept += measured * per_window * (config.num_hidden_layers + 2)  # what the layers are given, and gradients
        for chosen in by_layer:
            kept += sum(4 * layer[path].shape[0] ** 2 for path, one in chosen.items() if one.fisher)
    outer = params_of(model_spec.without_layers())
    rows = batch_size(max(1, evaluated), length, mesh, batch_tokens)
    programs.append((abstract_predictions(model_spec, outer, (rows, length), mesh, compared=states > 0), 0))
    device = max(_program_bytes(program) + beside for program, beside in programs)

    layer_bytes, outer_bytes = stored_bytes(layer), stored_bytes(outer)
    embedding = sum(stored_bytes(leaf) for p, leaf in outer.items() if p.startswith(model_spec.model_class.EMBEDDING))
    quantized = [_quantized_bytes(layer, chosen, recipe.bits) for chosen in by_layer]
    tables = jax.eval_shape(partial(with_fp8_tables, recipe=recipe), outer)
    processes = jax.process_count()
    # this layer and the next one, and, of one tensor, its copies as it is read
    largest = max(stored_bytes(leaf) for leaf in (layer | outer).values())
    host = 2 * layer_bytes + 3 * largest + max(quantized) + max(embedding, outer_bytes - embedding)
    host += max(streams * count, evaluated) * per_window // processes
    free_device = free_device_memory()
    if on_cpu():
        host += device * len(mesh.local_devices)
    resident = resident_memory()
    return Estimate(
        host=resident + host + _PROGRAMS,
        resident=resident,
        per_window=per_window // processes,
        device=device,
        disk=max(0, sum(quantized) + stored_bytes(tables) + kept - written),
        windows=count,
        streams=streams,
        evaluated=evaluated,
        free_host=free_host_memory(),
        free_device=free_device,
        free_disk=free_disk(place),
    )


def _largest(runs: list[tuple[tuple[str, ...], int]], layer: Flat) -> list[tuple[tuple[str, ...], int]]:
    """Those that take most: of the most inputs, and of the most weights."""
    inputs = lambda run: layer[run[0][0]].shape[0]
    weights = lambda run: sum(layer[path].size for path in run[0])
    return list({max(runs, key=inputs), max(runs, key=weights)})


def _program_bytes(program: Any) -> int:
    """Of a lowered program, on each device."""
    memory = program.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _quantized_bytes(layer: Flat, chosen: dict[str, LinearRecipe], bits: float | None) -> int:
    others = stored_bytes([leaf for path, leaf in layer.items() if path not in chosen])
    of = lambda path, r: stored_bits(layer[path].shape, r) if bits is None else int(bits * layer[path].size)
    return others + sum(of(path, recipe) for path, recipe in chosen.items()) // 8

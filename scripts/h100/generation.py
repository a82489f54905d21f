"""Prefill and decode of a whole LLaMA with random weights: bf16, W8A8 and W4A8, time and memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from h100.common import (
    DATASHEET,
    Clock,
    Sizes,
    compiled_in_parallel,
    compiler_options,
    filled,
    floor_seconds,
    free_memory,
    markdown,
    on_gpu,
    ratio_text,
    seconds_of,
    time_text,
)

from fpq_jax import QuantSpec, lorc, prepare, quantize_array
from fpq_jax._generation.generator import GREEDY, prefill, step  # private: the compiled steps, timed without the loop
from fpq_jax._generation.row_sharding import row_keys  # private: what the compiled steps are given
from fpq_jax.debug import Program
from fpq_jax.models.llama import Llama, LlamaConfig
from fpq_jax.models.parameters import abstract_model, params_of, with_params

W8A8 = QuantSpec(format="e4m3", group_size="channel")
# name -> (weights, LoRC's rank, layout)
VARIANTS = {
    "bf16": (None, 0, "fp8"),
    "W4A8 + LoRC fp8": ("m2", 8, "fp8"),
    "W4A8 + LoRC fp8, FP8 cache": ("m2", 8, "fp8"),
    "W8A8": (W8A8, 0, "fp8"),
    "W4A8 packed": ("m2", 0, "packed"),
    "W4A8 fp8": ("m2", 0, "fp8"),
    "W4A8 fragments": ("m2", 0, "fragments"),
}
# the kernel's is measured with the kernel
MEASURED = [variant for variant in VARIANTS if variant != "W4A8 fragments"]


@dataclass(frozen=True)
class Case:
    """A prefill of ``tokens``, or a decode step (1) of a batch."""

    variant: str
    batch: int
    tokens: int
    slots: int
    attention: str = "xla"

    @property
    def fp8_cache(self) -> bool:
        return self.variant.endswith("FP8 cache")

    def row(
        self, config: LlamaConfig, seconds: float | None, ceilings: dict[str, float], **more: Any
    ) -> dict[str, Any]:
        new = self.batch * self.tokens
        hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        linears, head = layers * (4 * hidden**2 + 3 * hidden * ffn), hidden * config.vocab_size
        bytes_ = linears * {"bf16": 2, "W4A8 packed": 0.5, "W4A8 fragments": 0.5}.get(self.variant, 1) + 2 * head
        if self.tokens == 1:
            # keys and values of every slot, and an FP8 cache's scales of heads of 128
            bytes_ += 2 * (1 + 4 / 128 if self.fp8_cache else 2) * self.batch * self.slots * hidden * layers
        attention = 2 * (new * self.tokens if self.tokens > 1 else new * self.slots) * hidden * layers
        kind = "bf16" if self.variant == "bf16" else "fp8"
        ops = {"bf16": 1e-12 * (attention + 2 * self.batch * head)}
        ops[kind] = ops.get(kind, 0) + 2e-12 * new * linears
        row = {
            "variant": self.variant,
            "phase": "prefill" if self.tokens > 1 else "decode",
            "batch": self.batch,
            "tokens": self.tokens,
            "slots": self.slots,
            "attention": self.attention,
            "floor_seconds": floor_seconds(bytes_, ops, DATASHEET),
            "seconds": seconds,
        }
        if seconds is not None:
            row |= {
                "tokens_per_second": new / seconds,
                "share_of_measured_ceiling": floor_seconds(bytes_, ops, ceilings) / seconds,
            }
        return row | more


def config_of(sizes: Sizes) -> LlamaConfig:
    hidden, ffn, layers, vocabulary = next(iter(sizes.models.values()))
    return LlamaConfig.from_hf(
        {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, hidden // 128),
            "max_position_embeddings": 2048,
        }
    )


def cases(sizes: Sizes, variant: str) -> list[Case]:
    attentions = ("xla", "cudnn") if on_gpu() or sizes.prompt > 1000 else ("xla",)
    prompts = [Case(variant, 1, sizes.prompt, sizes.prompt, attention) for attention in attentions]
    return [*prompts, *(Case(variant, batch, 1, slots) for batch, slots in sizes.decode)]


def predictions(sizes: Sizes) -> list[dict[str, Any]]:
    return [case.row(config_of(sizes), None, DATASHEET) for variant in MEASURED for case in cases(sizes, variant)]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each case, with its speed over bf16's."""
    plain = {(r["phase"], r["batch"], r["attention"]): r["seconds"] for r in rows if r["variant"] == "bf16"}
    header = ["variant", "phase", "batch", "slots", "attention", "floor", "seconds", "bf16 / this", "of ceiling"]
    header += ["weights", "cache", "temporaries", "kernels a layer", "note"]
    size = lambda row, key: f"{row[key] / 2**30:.2f} GiB" if key in row else "-"
    cells = [
        [
            *(str(row[key]) for key in ("variant", "phase", "batch", "slots", "attention")),
            time_text(row["floor_seconds"]),
            time_text(row["seconds"]),
            ratio_text(plain.get((row["phase"], row["batch"], row["attention"])), row["seconds"]),
            f"{100 * row['share_of_measured_ceiling']:.0f} %" if row["seconds"] else "-",
            *(size(row, key) for key in ("weight_bytes", "cache_bytes", "temp_bytes")),
            str(row.get("kernels_per_layer", "-")),
            row.get("note", ""),
        ]
        for row in rows
    ]
    return markdown(header, cells)


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    config, rows = config_of(sizes), []
    for variant in MEASURED:
        rows += measured(config, variant, cases(sizes, variant), sizes, clock, ceilings)
    return rows


def measured(
    config: LlamaConfig, variant: str, todo: list[Case], sizes: Sizes, clock: Clock, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of one variant's cases."""
    if clock.left() < 30 and on_gpu():
        return [case.row(config, None, ceilings, note="out of time") for case in todo]
    rows = []
    model = random_model(config, variant, sizes.group_size)
    state = nnx.split(model)[1]
    for case, program in compiled_in_parallel(todo, lambda case, model=model: _compiled(model, case)):
        try:
            if isinstance(program, Exception):
                raise program
            if clock.left() < 3 and on_gpu():
                rows.append(case.row(config, None, ceilings, note="out of time"))
            else:
                rows.append(_measure(program, model, state, case, sizes, ceilings))
        except Exception as error:  # out of memory, or no cuDNN: reported, and the others go on
            rows.append(case.row(config, None, ceilings, note=f"{type(error).__name__}: {str(error)[:200]}"))
        free_memory()
    del model, state, program
    free_memory()
    return rows


def random_model(config: LlamaConfig, variant: str, group_size: int) -> Any:
    """A prepared model of a variant with random weights, made on the device."""
    spec_name, rank, layout = VARIANTS[variant]
    spec = QuantSpec(constraint="m2", group_size=group_size) if spec_name == "m2" else spec_name
    model = abstract_model(Llama, config, jnp.bfloat16)

    def stored(w: Any) -> Any:
        q = quantize_array(w, spec)
        return lorc(w, q, rank=rank) if rank else q

    shapes: dict[Any, Any] = {}
    params = params_of(model)
    for path, leaf in params.items():
        if spec is not None and path.startswith("layers.") and path.endswith(".kernel"):
            if leaf.shape not in shapes:
                shapes[leaf.shape] = jax.eval_shape(stored, leaf)
            params[path] = shapes[leaf.shape]
    return prepare(with_params(model, filled(params)), layout)


def _arguments(model: Any, case: Case) -> tuple[Any, ...]:
    """Tokens, an empty cache, lengths or positions, and keys."""
    cache = model.init_cache(case.batch, case.slots, jnp.float8_e4m3fn if case.fp8_cache else jnp.bfloat16)
    given = jnp.ones((case.batch, case.tokens) if case.tokens > 1 else (case.batch,), jnp.int32)
    at = jnp.full((case.batch,), case.tokens if case.tokens > 1 else case.slots - 1, jnp.int32)
    return given, cache, at, row_keys(0, case.batch)


def _compiled(model: Any, case: Case) -> Any:
    graph, state = nnx.split(
        model if case.attention == "xla" else prepare(model, VARIANTS[case.variant][2], attention="cudnn")
    )
    jitted = jax.jit(prefill if case.tokens > 1 else step, static_argnums=(0, 1), donate_argnums=4)
    lowered = jitted.lower(graph, GREEDY, state, *jax.eval_shape(lambda: _arguments(model, case)))
    return lowered.compile(compiler_options=compiler_options("cublas"))


def _measure(
    program: Any, model: Any, state: Any, case: Case, sizes: Sizes, ceilings: dict[str, float]
) -> dict[str, Any]:
    given, cache, at, keys = _arguments(model, case)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    count = 2 if case.tokens > 1 else sizes.decode_steps

    def several() -> Any:
        nonlocal cache
        token = None
        for _ in range(count):
            token, cache, _ = program(state, given, cache, at, keys)
        return token

    seconds, inside = seconds_of(several, sizes.repeats) / count, Program.of(program)
    return case.row(
        model.config,
        seconds,
        ceilings,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        cache_bytes=cache_bytes,
        temp_bytes=inside.temp_bytes,
        kernels_per_layer=round(len(inside.launches) / model.config.num_hidden_layers, 1),
        fp8_products=len(inside.matmuls("fp8_matmul")),
    )

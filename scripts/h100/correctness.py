"""Is what the device computes what this project's CPU tests have checked? Each row is a check with its bound."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from h100.common import Clock, Sizes, compiled_in_parallel, compiler_options, markdown, on_gpu

from fpq_jax import (
    E4M3,
    INT8_ASYM,
    Generator,
    QuantSpec,
    dequantize,
    gptq,
    hessian,
    linear,
    load,
    lorc,
    output_error,
    prepare,
    quantize_array,
    quantize_tokens,
)
from fpq_jax._checkpoints.demo import demo_model_path  # private: the demo's own files and texts
from fpq_jax._matmul.products import product_kind  # private: checks which product is taken
from fpq_jax._matmul.weight_layouts import to_layout  # private: one kernel in each layout
from fpq_jax._numerics.activations import fake_quantize_tokens  # private: the rounding that is compared with
from fpq_jax.debug import Program
from fpq_jax.models.parameters import params_of, with_params

SPECS = {
    "W8A8": QuantSpec(format="e4m3", group_size="channel"),
    "W4A8 M1": QuantSpec(constraint="m1", group_size=64),
    "W4A8 M2": QuantSpec(constraint="m2", group_size=64),
    "W4A8 E3M0 M2": QuantSpec(format="e3m0", constraint="m2", group_size=64),
    "W4A8 INT4 M2": QuantSpec(format="int4", constraint="m2", group_size=64),
    "W4A8 free": QuantSpec(group_size=64),
    "W8A8 INT": QuantSpec(format="int8-asym", group_size="channel", activation="int8-asym"),
}
MODEL_SPECS = {name: SPECS[name] for name in ("W8A8", "W4A8 M2")}
RANK = 8


def run(sizes: Sizes, clock: Clock, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def check(name: str, value: float, bound: float, *, at_least: bool = False) -> None:
        passed = value >= bound if at_least else value <= bound
        rows.append({"check": name, "value": float(value), "bound": bound, "passed": bool(passed)})

    # a check that cannot be run has failed; the others go on
    for part in (_formats, _gptq, _linears, _model):
        if clock.left() < 10 and on_gpu():
            rows.append({"check": part.__name__.strip("_"), "value": None, "passed": False, "note": "out of time"})
            continue
        try:
            part(check, sizes)
        except Exception as error:
            note = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append({"check": part.__name__.strip("_"), "value": None, "passed": False, "note": note})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    number = lambda value: "-" if value is None else f"{value:.3g}"
    cells = [
        [r["check"], number(r["value"]), number(r.get("bound")), "ok" if r["passed"] else "FAILED", r.get("note", "")]
        for r in rows
    ]
    return markdown(["check", "value", "bound", "", "note"], cells)


Check = Callable[..., None]


def _on_cpu(f: Callable[..., Any], *arguments: Any) -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(f(*jax.device_get(arguments)))


def _difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _operands(tokens: int = 37, inputs: int = 300, outputs: int = 200) -> tuple[Any, Any]:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, inputs)) * np.exp(rng.standard_normal((tokens, 1)))
    x[:, 5] *= 40
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)


def _formats(check: Check, sizes: Sizes) -> None:
    x, _ = _operands(256, 1024)
    x = x.at[3].set(0).at[4, 7].set(1e30).at[5].multiply(1e-30)
    for fmt in (E4M3, INT8_ASYM):
        here = jax.jit(lambda x, fmt=fmt: quantize_tokens(x, fmt)[:2])(x)
        there = _on_cpu(lambda x, fmt=fmt: quantize_tokens(jnp.asarray(x), fmt)[:2], x)
        codes = [np.asarray(c).view(np.int8).astype(int) for c in (here[0], there[0])]
        differ = np.abs(codes[0] - codes[1])
        check(f"{fmt} codes: largest difference", differ.max(), 1)
        check(f"{fmt} codes: share that differ", (differ > 0).mean(), 1e-3)
        check(f"{fmt} scales", np.abs(np.asarray(here[1]) / there[1] - 1).max(), 1e-6)


def _linears(check: Check, sizes: Sizes) -> None:
    """At the precision that is used and timed; and once at a real size, with fast accumulation and without."""
    jobs, expected = [], {}
    for name, spec in SPECS.items():
        q = jax.jit(lambda w, spec=spec: lorc(w, quantize_array(w, spec), rank=RANK))(_operands()[1])
        for tokens in sizes.checked_tokens:
            x = _operands(tokens)[0]
            expected[name, tokens] = _on_cpu(lambda x, q, spec=spec: _plain(x, q, spec), x, q)
            jobs += [
                (f"{name} {form}, {tokens} tokens", (name, tokens), x, to_layout(q, form)) for form in ("fp8", "packed")
            ]
    for (what, at, x, held), program in compiled_in_parallel(jobs, lambda job: _compiled(job[2], job[3])):
        if isinstance(program, Exception):
            raise program
        check(f"{what}, against float64", _difference(program(x, held), expected[at]), 1e-2)
        if on_gpu() and product_kind(held) == "fp8":
            check(f"{what}: FP8 products", len(Program.of(program).matmuls("fp8_matmul")), 1, at_least=True)
    x, w = _operands(64, *sizes.checked_linear)
    q = jax.jit(lambda w: lorc(w, quantize_array(w, SPECS["W8A8"]), rank=RANK))(w)
    exact, held = _on_cpu(lambda x, q: _plain(x, q, SPECS["W8A8"]), x, q), to_layout(q, "fp8")
    check("W8A8, a real size, fast accumulation", _difference(_compiled(x, held)(x, held), exact), 1e-2)
    with jax.default_matmul_precision("highest"):
        check("W8A8, a real size, precision highest", _difference(_compiled(x, held)(x, held), exact), 1e-3)


def _compiled(x: Any, held: Any) -> Any:
    return jax.jit(linear).lower(x, held).compile(compiler_options=compiler_options("cublas"))


def _plain(x: Any, q: Any, spec: QuantSpec) -> Any:
    """The product of dequantized operands in float64."""
    tokens = np.asarray(fake_quantize_tokens(jnp.asarray(x), spec.activation), np.float64)
    weight = np.asarray(dequantize(q, low_rank=False), np.float64)
    return tokens @ weight + np.asarray(x, np.float64) @ np.asarray(q.low_rank.product(), np.float64)


def _gptq(check: Check, sizes: Sizes) -> None:
    x, w = _operands(2000, 512, 384)
    h = jax.device_get(hessian(x + jnp.roll(x, 1, axis=1)))
    spec = SPECS["W4A8 M2"]
    here, there = gptq(w, h, spec), _on_cpu(lambda w, h: gptq(jnp.asarray(w), jnp.asarray(h), spec), w, h)
    check("GPTQ: share of equal codes", (np.asarray(here.codes) == there.codes).mean(), 0.98, at_least=True)
    errors = [_on_cpu(lambda w, q, h: output_error(w, dequantize(q), h), w, q, h) for q in (here, there)]
    check("GPTQ: output error over the CPU's", errors[0] / errors[1], 1.01)


def _model(check: Check, sizes: Sizes) -> None:
    stored = load(demo_model_path(), dtype="float32")
    tokens = np.random.default_rng(0).integers(0, stored.config.vocab_size, (2, 64))
    prompts = [row[:n].tolist() for row, n in zip(np.tile(tokens, (2, 1)), (3, 40, 17, 1), strict=True)]
    for name, spec in {**MODEL_SPECS, "W4A16": replace(SPECS["W4A8 M2"], activation=None)}.items():
        what = f"demo model {name}"
        quantize = jax.jit(lambda w, spec=spec: lorc(w, quantize_array(w, spec), rank=RANK))
        linears = lambda path: path.startswith("layers.") and path.endswith(".kernel")
        params = {p: quantize(leaf) if linears(p) else leaf for p, leaf in params_of(stored).items()}
        model = with_params(stored, params)

        graph, state = nnx.split(prepare(model))
        lowered = _forward.lower(graph, state, jnp.asarray(tokens))
        program = lowered.compile(compiler_options=compiler_options("cublas"))
        expected = _on_cpu(lambda state, tokens, graph=graph: _forward(graph, state, tokens), state, tokens)
        # one turned code of an activation moves the logits by a percent
        check(f"{what}: logits against the CPU's", _difference(program(state, jnp.asarray(tokens)), expected), 0.05)
        if on_gpu() and name in MODEL_SPECS:
            found = len(Program.of(program).matmuls("fp8_matmul"))
            check(f"{what}: FP8 products in a layer", found / stored.config.num_hidden_layers, 4, at_least=True)

        # where codes can turn, rows may part; where they cannot, they must not
        least = 0.5 if name in MODEL_SPECS else 1.0
        with jax.default_matmul_precision("highest"):
            generator = Generator(prepare(model))
            together = generator(prompts, max_new_tokens=12).tokens
            alone = [generator([prompt], max_new_tokens=12).tokens[0] for prompt in prompts]
            packed = Generator(prepare(model, "packed"))(prompts, max_new_tokens=12).tokens
        check(
            f"{what}: share of a batch's tokens that are the same alone", _equal(together, alone), least, at_least=True
        )
        check(f"{what}: share of tokens the same with packed weights", _equal(together, packed), least, at_least=True)
    if on_gpu():
        sixteen = load(demo_model_path(), dtype="bfloat16")
        causal = [prepare(sixteen, attention=how)(jnp.asarray(tokens)) for how in ("cudnn", "xla")]
        check("cuDNN's attention against XLA's", _difference(*causal), 0.03)


@partial(jax.jit, static_argnums=0)
def _forward(graph: Any, state: Any, tokens: Any) -> Any:
    return nnx.merge(graph, state)(tokens)


def _equal(a: list[list[int]], b: list[list[int]]) -> float:
    return float(np.mean(np.asarray(a) == np.asarray(b)))

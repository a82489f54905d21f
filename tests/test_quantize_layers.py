import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, forward, random_tensors, write_checkpoint

from fpq_jax import QTensor, Recipe, dequantize, gptq
from fpq_jax._checkpoints.demo import demo_model_path
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._pipeline.perplexity import perplexity
from fpq_jax._pipeline.quantize_layers import linears, quantize_checkpoint
from fpq_jax._pipeline.text import calibration_text
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.mesh import make_mesh
from fpq_jax.models.parameters import build_model


def quantized(checkpoint, what, windows, dtype=jnp.float32, **options):
    """(all parameters by path, all results)"""
    parts = list(quantize_checkpoint(checkpoint, what, windows, dtype, make_mesh(), **options))
    params = {path: leaf for part in parts for path, leaf in part.params.items()}
    return jax.device_get(params), [result for part in parts for result in part.results]


def recipe(**options):
    return Recipe.from_dict({"weight": {"group_size": 32, "constraint": "m2"}} | options)


def forward_through(model, tokens, positions, layers):
    """The hidden states behind the first layers."""
    hidden = model.embed(tokens, positions)
    for layer in list(model.layers)[:layers]:
        hidden, _ = layer(hidden, positions)
    return hidden


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(0, 300, (21, 48)).astype(np.int32)


def test_every_linear_is_quantized_better_than_by_rounding_and_lorc_helps(tiny_llama, windows):
    checkpoint = HfCheckpoint(tiny_llama)
    params, results = quantized(checkpoint, recipe(), windows)
    assert len(results) == 14
    assert {r.name for r in results} == set(linears(checkpoint).values())
    assert params.keys() == checkpoint.shapes.keys()
    assert all(r.error < r.rounding_error for r in results)
    assert all(isinstance(leaf, QTensor) == path.endswith("_proj.kernel") for path, leaf in params.items())
    _, corrected = quantized(checkpoint, recipe(lorc={"rank": 4}), windows)
    assert all(b.error < a.error for a, b in zip(results, corrected, strict=True))


@pytest.mark.parametrize("options", [{}, {"sequential": True, "error_propagation": 0.5}])
def test_in_bfloat16_it_is_calibrated_as_in_float32(tiny_llama, windows, options):
    """Products there have a form of their own on a CPU."""
    checkpoint = HfCheckpoint(tiny_llama)
    _, exact = quantized(checkpoint, recipe(**options), windows)
    _, rounded = quantized(checkpoint, recipe(**options), windows, jnp.bfloat16)
    for one, other in zip(exact, rounded, strict=True):
        assert other.error == pytest.approx(one.error, rel=0.1)
        # what makes up for others' errors is further from its own weight
        assert options or other.error < other.rounding_error


def test_hessians_are_of_the_quantized_inputs_behind_the_quantized_layers(tiny_llama, windows):
    """The second layer's q_proj, by hand: embed, first layer quantized, norm, quantized activations, X^T X, GPTQ."""
    checkpoint = HfCheckpoint(tiny_llama)
    what = recipe()
    params, _ = quantized(checkpoint, what, windows)
    model = build_model(checkpoint.model_class, checkpoint.model_config, params)
    positions = jnp.broadcast_to(jnp.arange(48), windows.shape)
    hidden, _ = model.layers[0](model.embed(jnp.asarray(windows), positions), positions)
    x = fake_quantize_tokens(model.layers[1].input_layernorm(hidden), what.default.spec.activation)
    rows = np.asarray(x, np.float64).reshape(-1, 48)
    h = jnp.asarray(rows.T @ rows / len(rows), jnp.float32)
    w = jnp.asarray(checkpoint.read(jnp.float32, "layers.1.self_attn.q_proj")["layers.1.self_attn.q_proj.kernel"])
    expected = np.asarray(dequantize(gptq(w, h, what.default.spec)))
    got = np.asarray(dequantize(jax.tree.map(jnp.asarray, params["layers.1.self_attn.q_proj.kernel"])))
    assert (got == expected).mean() > 0.99


JOINT = {
    "sequential": True,
    "order": "activation",
    "scale_search": True,
    "sweeps": 1,
    "error_propagation": 0.5,
    "lorc": {"rank": 4, "weighted": True, "rounds": 1},
}


@pytest.mark.full
@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_opt"])
def test_a_sequential_run_makes_up_for_errors_and_goes_on_where_it_was_left(folder, request, windows):
    checkpoint = HfCheckpoint(request.getfixturevalue(folder))
    params, results = quantized(checkpoint, recipe(**JOINT), windows)
    assert all(r.error < r.rounding_error for r in results) and len(results) == len(linears(checkpoint))
    first = {path: leaf for path, leaf in params.items() if path.startswith("layers.0.")}
    finished = {"embedding": dict, "layers.0": lambda: jax.tree.map(jnp.asarray, first)}
    rest, _ = quantized(checkpoint, recipe(**JOINT), windows, finished=finished)
    assert {path for path in params if path.startswith("layers.1.")} < rest.keys() < params.keys() - first.keys()
    chex.assert_trees_all_equal(rest, {path: params[path] for path in rest})


@pytest.mark.full
def test_a_static_scale_covers_what_calibration_saw(tiny_opt, windows):
    """The second layer's fc1, by hand: its input with nothing of its own layer quantized."""
    checkpoint = HfCheckpoint(tiny_opt)
    what = recipe(activation="int8-asym", activation_scale="static")
    params, _ = quantized(checkpoint, what, windows)
    first = {p: v for p, v in params.items() if p.startswith("layers.0.")}
    model = build_model(checkpoint.model_class, checkpoint.model_config, checkpoint.read(jnp.float32) | first)
    positions = jnp.broadcast_to(jnp.arange(48), windows.shape)
    hidden, _ = model.layers[0](model.embed(jnp.asarray(windows), positions), positions)
    layer = model.layers[1]
    attention, _ = layer.self_attn(
        layer.self_attn_layer_norm(hidden), jnp.broadcast_to(jnp.arange(48), hidden.shape[:2]), None, False
    )
    x = np.asarray(layer.final_layer_norm(hidden + attention))
    q = params["layers.1.fc1.kernel"]
    np.testing.assert_allclose(q.input_scale, [(x.max() - x.min()) / 255], rtol=1e-4)
    assert q.input_zero.tolist() == [round(-x.min() / (x.max() - x.min()) * 255)]
    mixed = recipe(activation="int4", rules=[{"match": "*.q_proj", "activation_scale": "static"}])
    names = [f"self_attn.{p}_proj.kernel" for p in "qkv"]
    first_layer = {}
    quantized(checkpoint, mixed, windows, first_layer=first_layer)
    q_name, *others = names
    (seen,) = first_layer.values()
    assert q_name in seen.static_scales and not any(name in seen.static_scales for name in others)
    own, shared = seen.inputs[(q_name,)].hessian, seen.inputs[tuple(others)].hessian
    assert np.abs(own - shared).max() > 1e-3 * np.abs(shared).max()
    parts = [params[f"layers.1.self_attn.{p}_proj.kernel"].input_scale for p in "qkv"]
    assert parts[0] == parts[1] == parts[2]


@pytest.mark.full
def test_recipes_share_the_first_layers_calibration_and_nothing_else(tiny_llama, windows, monkeypatch):
    import fpq_jax._pipeline.quantize_layers as pipeline

    calls, calibrate = [], pipeline.calibrate
    monkeypatch.setattr(pipeline, "calibrate", lambda *a, **b: (calls.append(a), calibrate(*a, **b))[1])
    checkpoint, first_layer = HfCheckpoint(tiny_llama), {}
    run = lambda what, **kept: quantized(checkpoint, what, windows, **kept)[0]
    other = recipe(weight={"format": "int4", "group_size": 16})
    run(recipe(), first_layer=first_layer)
    assert len(first_layer) == 1 and len(calls) == 2
    shared = run(other, first_layer=first_layer)
    assert len(calls) == 3  # the second layer's alone
    chex.assert_trees_all_equal(shared, run(other))
    run(recipe(activation="int8"), first_layer=first_layer)
    assert len(first_layer) == 2


def test_the_last_batch_s_filling_does_not_count(tiny_llama, windows):
    """One window a batch, and batches that do not divide the windows, give the same result."""
    checkpoint = HfCheckpoint(tiny_llama)
    single, _ = quantized(checkpoint, recipe(), windows, batch_tokens=1)
    filled, _ = quantized(checkpoint, recipe(), windows, batch_tokens=2 * 48)
    for path, leaf in single.items():
        if isinstance(leaf, QTensor):
            assert (leaf.codes == filled[path].codes).mean() > 0.98


def test_the_same_seed_gives_the_same_bits(tiny_llama, windows):
    checkpoint = HfCheckpoint(tiny_llama)
    runs = [quantized(checkpoint, recipe(lorc={}), windows, seed=3)[0] for _ in range(2)]
    chex.assert_trees_all_equal(*runs)


@pytest.mark.full
def test_each_option_brings_the_layers_output_nearer_to_the_unquantized_one_on_other_text():
    """The demo model's first two layers, on the text that is held back: what acts on several weights, and all."""
    checkpoint = HfCheckpoint(demo_model_path())
    tokenizer = load_tokenizer(checkpoint.folder)
    options = {"length": 256, "vocab_size": checkpoint.model_config.vocab_size}
    text = calibration_text("demo", tokenizer, num_samples=32, seed=0, hold_back=True, **options)
    held = jnp.asarray(text.tail[:16])
    positions = jnp.broadcast_to(jnp.arange(256), held.shape)

    def hidden(params):
        model = build_model(checkpoint.model_class, checkpoint.model_config, params)
        return np.asarray(forward_through(model, held, positions, 2))

    original = hidden(checkpoint.read(jnp.float32))
    everything = JOINT | {"lorc": None, "sweeps": 2}
    errors = {}
    for name, what in {
        "plain": {},
        "propagation": {"sequential": True, "error_propagation": 0.5},
        "all": everything,
    }.items():
        params, _ = quantized(checkpoint, Recipe.from_dict({"weight": {"constraint": "m2"}} | what), text.windows)
        errors[name] = np.linalg.norm(hidden(params) - original)
    assert all(errors[name] < errors["plain"] for name in errors if name != "plain"), errors
    assert errors["all"] == min(errors.values()), errors


@pytest.mark.full
def test_gptq_lowers_the_demo_models_perplexity_below_roundings():
    checkpoint = HfCheckpoint(demo_model_path())
    tokenizer = load_tokenizer(checkpoint.folder)
    options = {"length": 256, "vocab_size": checkpoint.model_config.vocab_size}
    text = calibration_text("demo", tokenizer, num_samples=32, seed=0, hold_back=True, **options)
    build = lambda params: build_model(checkpoint.model_class, checkpoint.model_config, params)
    values = {"original": perplexity(forward, build(checkpoint.read(jnp.float32)), text.tail[:32]).value}
    for method in ("gptq", "round"):
        what = Recipe.from_dict({"weight": {"constraint": "m2"}, "method": method})
        params, results = quantized(checkpoint, what, text.windows)
        values[method] = perplexity(forward, build(params), text.tail[:32]).value
        assert all((r.error < r.rounding_error) == (method == "gptq") for r in results)
    assert values["original"] < values["gptq"] < values["round"] < 1.2 * values["original"]


def test_rules_leave_linears_as_they_are(tiny_llama, windows):
    what = recipe(rules=[{"match": "model.layers.0.*", "quantize": False}])
    params, results = quantized(HfCheckpoint(tiny_llama), what, windows)
    assert {r.name.split(".")[2] for r in results} == {"1"}
    assert not isinstance(params["layers.0.mlp.up_proj.kernel"], QTensor)


@pytest.mark.full
def test_dead_layers_and_zero_weights_are_finite_and_said(tmp_path, windows):
    tensors = random_tensors(TINY_CONFIG)
    tensors["model.layers.0.input_layernorm.weight"][:] = 0  # q, k and v see zeros; o as well, through v
    tensors["model.layers.1.post_attention_layernorm.weight"][:7] = 0  # seven inputs of gate and up never act
    tensors["model.layers.1.mlp.down_proj.weight"][5] = 0
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path / "m", TINY_CONFIG, tensors))
    params, results = quantized(checkpoint, recipe(lorc={"rank": 2}), windows)
    notes = {r.name: " ".join(r.notes) for r in results}
    for part in "qkvo":
        assert "all zero during calibration" in notes[f"model.layers.0.self_attn.{part}_proj"]
    assert "7 inputs were zero" in notes["model.layers.1.mlp.up_proj"]
    assert "1 output rows are all zero" in notes["model.layers.1.mlp.down_proj"]
    assert sum(r.fell_back for r in results) == 4
    for leaf in jax.tree.leaves(params):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    model = build_model(checkpoint.model_class, checkpoint.model_config, params)
    assert np.isfinite(perplexity(forward, model, windows).value)

"""Trees of other people's models quantized: against our own pipeline, and every kind of tree and mistake."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fpq_jax as fpq
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._pipeline.batches import Batches
from fpq_jax._pipeline.calibration import Stream, calibrate, recorded_kernels
from fpq_jax._pipeline.quantize_layers import linears, quantize_checkpoint
from fpq_jax._support.mesh import make_mesh
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import named_leaves
from fpq_jax.models.parameters import params_of
from fpq_jax.models.spec import ModelSpec

LORC = fpq.Recipe.load("w4a8-fp-m2-lorc").with_group_size(16)
PLAIN = fpq.Recipe.load("w4a8-fp-m2").with_group_size(16)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _llama(folder):
    """(apply, params, recipe) of a model's Linears, as if it were anyone's; a recipe for its tree of parameters."""
    graph, params = nnx.split(fpq.load(folder, dtype=jnp.float32))
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params


def _same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, replace(got, axes=None), wanted)


@pytest.mark.full
def test_our_llama_by_the_general_road_is_what_the_pipeline_makes_of_it(tiny_llama):
    windows = np.random.default_rng(0).integers(0, 250, (8, 32)).astype(np.int32)
    checkpoint = HfCheckpoint(tiny_llama)
    recipe = LORC.with_lorc_rank(4)
    parts = quantize_checkpoint(checkpoint, recipe, windows, "float32", make_mesh())
    pipeline = {path: leaf for part in parts for path, leaf in part.params.items()}

    apply, params = _llama(tiny_llama)
    general = recipe.with_rule("lm_head*", quantize=False)
    hessians = fpq.collect_hessians(apply, params, [windows[:4], windows[4:]], general)
    assert tuple(f"layers.0.self_attn.{name}_proj.kernel" for name in "kqv") in hessians.stats.inputs
    # the first layer's inputs depend on nothing quantized
    model, mesh = fpq.load(tiny_llama, dtype=jnp.float32), make_mesh()
    positions = jnp.broadcast_to(jnp.arange(32), windows.shape)
    hidden, quantized = model.embed(jnp.asarray(windows), positions), fpq.quantize_params(params, general, hessians)
    names = linears(checkpoint)
    recipes = recipe.for_linears(names.values())
    leaves = dict(named_leaves(quantized, lambda leaf: isinstance(leaf, fpq.QTensor))[0])
    for i, layer in enumerate(model.layers):
        own = {path: name for path, name in names.items() if path.startswith(f"layers.{i}.")}
        todo = {path.removeprefix(f"layers.{i}."): recipes[name] for path, name in own.items()}
        batches = Batches.of(windows, mesh, 4)
        rows = [np.asarray(hidden[:4]), np.asarray(hidden[4:])]
        spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, np.dtype(np.float32))
        stream = Stream(replicate(params_of(layer), mesh), rows)
        stats = calibrate(spec, stream, recorded_kernels(todo, stream.params), batches)
        for paths, (matrix, count, _) in stats.inputs.items():
            assert count == windows.size
            largest = float(jnp.abs(matrix).max())
            np.testing.assert_allclose(hessians[f"layers.{i}.{paths[0]}"], matrix, atol=1e-5 * largest)
        # not sequentially: through the layer as it is, with activations quantized, as collect_hessians does it
        hidden = _with_quantized_activations(layer, hidden, positions)
    first = [name for name in names if name.startswith("layers.0.")]
    assert len(first) == 7
    for name in first:
        _same(leaves[name], pipeline[name])

    # block after block, it is the pipeline
    graph, _ = nnx.split(model.layers[0])
    block = lambda state, x: nnx.merge(graph, state)(x, _positions(x))[0]
    blocks = [(block, nnx.split(layer)[1]) for layer in model.layers]
    embedded = model.embed(jnp.asarray(windows), positions)
    done = list(fpq.quantize_blocks(blocks, [embedded[:4], embedded[4:]], recipe))
    with pytest.raises(fpq.FpqError, match=r"no parameter fits '2.mlp"):
        next(fpq.quantize_blocks(blocks, [embedded], recipe.with_rule("2.mlp.*", quantize=False)))
    agreeing = total = 0
    for i, (block, report) in enumerate(done):
        assert all(result.error < result.rounding_error for result in report.results)
        for path, leaf in named_leaves(block, lambda leaf: isinstance(leaf, fpq.QTensor))[0]:
            if isinstance(leaf, fpq.QTensor):
                same = np.asarray(leaf.codes == pipeline[f"layers.{i}.{path}"].codes)
                agreeing, total = agreeing + same.sum(), total + same.size
    assert total > 10_000 and agreeing / total > 0.999  # sums of batches in another order


@pytest.mark.full
def test_blocks_stage_by_stage_beside_the_unquantized_ones_are_the_pipeline(tiny_llama):
    windows = np.random.default_rng(0).integers(0, 250, (8, 32)).astype(np.int32)
    joint = {"order": "activation", "scale_search": True, "error_propagation": 0.5}
    recipe = fpq.Recipe.from_dict({"weight": {"constraint": "m2", "group_size": 16}, "sequential": True} | joint)
    parts = quantize_checkpoint(HfCheckpoint(tiny_llama), recipe, windows, "float32", make_mesh())
    pipeline = {path: leaf for part in parts for path, leaf in part.params.items()}
    model = fpq.load(tiny_llama, dtype=jnp.float32)
    graph, _ = nnx.split(model.layers[0])
    block = lambda state, x: nnx.merge(graph, state)(x, _positions(x))[0]
    embedded = model.embed(jnp.asarray(windows), jnp.broadcast_to(jnp.arange(32), windows.shape))
    blocks = [(block, nnx.split(layer)[1]) for layer in model.layers]
    done = list(fpq.quantize_blocks(blocks, [embedded[:4], embedded[4:]], recipe))
    agreeing = total = 0
    for i, (tree, report) in enumerate(done):
        assert len(report.results) == 7 and all(result.error < result.rounding_error for result in report.results)
        for path, leaf in named_leaves(tree, lambda leaf: isinstance(leaf, fpq.QTensor))[0]:
            if isinstance(leaf, fpq.QTensor):
                same = np.asarray(leaf.codes == pipeline[f"layers.{i}.{path}"].codes)
                agreeing, total = agreeing + same.sum(), total + same.size
    assert total > 10_000 and agreeing / total > 0.99  # sums of batches in another order
    with pytest.raises(fpq.FpqError, match="is sequential, and all Hessians at once are not; use quantize_blocks"):
        fpq.collect_hessians(*_llama(tiny_llama), [windows], recipe)
    with pytest.raises(fpq.FpqError, match="error_propagation, which needs the unquantized model beside it"):
        fpq.quantize_params({"kernel": jnp.ones((16, 16))}, recipe, {"kernel": jnp.eye(16)})


def _positions(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def _with_quantized_activations(layer, hidden, positions):
    linears = lambda x, weights: [fake_quantize_tokens(x, fpq.E4M3) @ kernel for kernel, _ in weights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpq_jax.models.layers.linears", linears)
        patch.setattr("fpq_jax.models.layers.linear", lambda x, kernel, bias: linears(x, [(kernel, bias)])[0])
        return layer(hidden, positions)[0]


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(16, (3,), name="conv")(x)
        x = linen.DenseGeneral((4, 8), name="heads")(x)
        return linen.DenseGeneral(16, axis=(-2, -1), name="joined")(jnp.tanh(x))


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.first, self.table = nnx.Linear(16, 32, rngs=rngs), nnx.Embed(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.first(x + self.table(jnp.array([3])))


X = _normal(0, 4, 6, 16)


def _trees():
    dense = Dense()
    graph, state = nnx.split(Linear(nnx.Rngs(0)))
    mlp = eqx.nn.MLP(16, 8, 32, depth=1, key=jax.random.key(0))
    return {
        "linen": (dense.apply, dense.init(jax.random.key(0), X), ["params.heads.kernel", "params.joined.kernel"]),
        "nnx": (lambda state, x: nnx.merge(graph, state)(x), state, ["first.kernel"]),
        "equinox": (
            lambda mlp, x: jax.vmap(jax.vmap(mlp))(x),
            mlp,
            ["layers.0.weight", "layers.1.weight"],
        ),
        "lists": (
            lambda p, x: jnp.tanh(x @ p[0]["w"]) @ p[1][0].T,
            [{"w": _normal(1, 16, 32)}, (_normal(2, 8, 32),)],
            ["0.w", "1.0"],
        ),
    }


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "lists"])
def test_every_kind_of_tree(kind, tmp_path):
    apply, params, kernels = _trees()[kind]
    hessians = fpq.collect_hessians(apply, params, [X], LORC)
    small, report = fpq.quantize_params_with_report(params, LORC, hessians)
    is_leaf = lambda leaf: isinstance(leaf, fpq.QTensor)
    assert jax.tree.structure(small, is_leaf=is_leaf) == jax.tree.structure(params)
    assert [path for path, leaf in named_leaves(small, is_leaf)[0] if is_leaf(leaf)] == kernels
    assert [r.name for r in report.results] == kernels
    assert all(0 < r.error < r.rounding_error < 0.05 and r.damping == 0.01 for r in report.results)
    if kind == "linen":
        assert report.left["params.conv.kernel"] == "it is used by conv_general_dilated, not in a product"
    run = lambda tree: eqx.filter_jit(fpq.quantized(apply))(tree, X)
    got, like = run(small), apply(params, X)
    assert got.shape == like.shape and float(jnp.abs(got - like).max()) < 0.25 * float(jnp.abs(like).max())
    # dequantized it has the original's shapes, and GPTQ's weights are not rounding's
    back, rounded = fpq.dequantize_params(small), fpq.quantize_params(params, PLAIN, uses=hessians.uses)
    assert jax.tree.map(jnp.shape, eqx.filter(back, eqx.is_array)) == jax.tree.map(
        jnp.shape, eqx.filter(params, eqx.is_array)
    )
    plain = fpq.quantize_params(params, PLAIN, hessians)
    differ = [
        bool((a.codes != b.codes).any())
        for a, b in zip(*(filter(is_leaf, jax.tree.leaves(t, is_leaf=is_leaf)) for t in (plain, rounded)), strict=True)
    ]
    assert all(differ)
    for ready in (fpq.expand_params(small, "fp8"), fpq.expand_params(small, "packed")):
        np.testing.assert_allclose(run(ready), got, rtol=1e-6, atol=1e-6)
    fpq.save(tmp_path / "tree", small)
    loaded = fpq.load(tmp_path / "tree", like=params)
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(t, eqx.is_array) for t in (loaded, small)))
    np.testing.assert_array_equal(run(loaded), got)


def test_a_stack_is_its_weights_each_solved_alone():
    params, x = {"s": _normal(1, 3, 16, 16) / 4}, _normal(2, 40, 16)
    apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0]
    hessians = fpq.collect_hessians(apply, params, [x], LORC)
    q = fpq.quantize_params(params, LORC, hessians)["s"]
    assert q.stack == (3,) and q.axes.kinds == ("stack", "in", "out")
    alone = lambda w, h: fpq.lorc(w, fpq.gptq(w, h, LORC.default.spec), rank=8)
    for i in range(3):
        _same(jax.tree.map(lambda a: a[i], q), alone(params["s"][i], hessians["s"][i]))  # noqa: B023


def test_without_a_function_names_and_rules_say_what_a_kernel_is():
    params = {
        "dense": {"kernel": _normal(1, 16, 8), "bias": _normal(2, 8)},
        "heads": {"kernel": _normal(3, 16, 2, 4)},
        "eqx": {"weight": _normal(4, 8, 16)},
    }
    small, report = fpq.quantize_params_with_report(params, PLAIN)
    assert isinstance(small["dense"]["kernel"], fpq.QTensor)
    assert report.left["heads.kernel"].startswith("which of its 3 axes are inputs is not known")
    assert report.left["eqx.weight"] == "it is not called kernel, and no rule says its axes"
    (result,) = report.results
    w = np.asarray(params["dense"]["kernel"], np.float64)
    lost = ((w - np.asarray(fpq.dequantize(small["dense"]["kernel"]))) ** 2).sum() / (w**2).sum()
    assert result.error == result.rounding_error == pytest.approx(lost, rel=1e-5)
    recipe = PLAIN.with_rule("heads.*", axes="in out out")
    recipe = recipe.with_rule("*.weight", axes="out in", weight={"group_size": 8})
    assert fpq.Recipe.from_dict(recipe.to_dict()) == recipe
    small, report = fpq.quantize_params_with_report(params, recipe)
    assert small["heads"]["kernel"].shape == (16, 8) and small["eqx"]["weight"].exponents.shape == (8, 2)
    assert report.left == {}
    np.testing.assert_allclose(
        fpq.dequantize_params(small)["heads"]["kernel"].reshape(16, 8), fpq.dequantize(small["heads"]["kernel"])
    )


def test_a_parameter_that_is_also_used_otherwise_is_quantized_if_a_rule_means_it():
    params = {"table": _normal(1, 24, 16), "w": _normal(2, 16, 16)}
    apply = lambda p, ids: p["table"][ids] @ p["w"] @ p["table"].T
    ids = jnp.arange(24)
    hessians = fpq.collect_hessians(apply, params, [ids], PLAIN)
    assert list(hessians) == ["w"]
    asked = PLAIN.with_rule("table")
    small = fpq.quantize_params(params, asked, fpq.collect_hessians(apply, params, [ids], asked))
    assert small["table"].axes.kinds == ("out", "in")
    with pytest.warns(UserWarning, match="table is used in a way that has no quantized form"):
        fpq.quantized(apply)(small, ids)


def test_mistakes_are_said():
    w = _normal(1, 16, 8)
    params = {"a": {"kernel": w}, "bias": jnp.ones(8)}
    error = lambda message: pytest.raises(fpq.FpqError, match=message)
    with error(r"no parameter fits 'a.kernels' \(did you mean a.kernel"):
        fpq.quantize_params(params, PLAIN.with_rule("a.kernels"))
    with error(r"bias, which 'bi\*' means, cannot be quantized: its shape is \(8,\)"):
        fpq.quantize_params(params, PLAIN.with_rule("bi*"))
    with error("leaves every parameter as it is"):
        fpq.quantize_params({"w": w}, PLAIN)
    with error("a.kernel has shape"):
        fpq.quantize_params(params, PLAIN.with_rule("a.kernel", axes="stack in out"))
    with error("each must be in, out or stack"):
        PLAIN.with_rule("a.kernel", axes="in side")
    with error("a.kernel holds values that are not finite"):
        fpq.quantize_params({"a": {"kernel": w.at[0, 0].set(jnp.nan)}}, PLAIN)
    with error("There is no Hessian of a.kernel"):
        fpq.quantize_params(params, PLAIN, {})
    with error(r"The Hessian of a.kernel has shape \(8, 8\); it must be \(16, 16\)"):
        fpq.quantize_params(params, PLAIN, {"a.kernel": jnp.eye(8)})
    with error("a.kernel met only zeros"):
        fpq.quantize_params(params, PLAIN, {"a.kernel": jnp.zeros((16, 16))})
    with error("The static activation scale of a.kernel needs calibration"):
        fpq.quantize_params(params, PLAIN.with_rule("a.*", activation_scale="static"))
    with error("Two leaves of the tree have the path a.kernel"):
        fpq.quantize_params({"a.kernel": w, "a": {"kernel": w}}, PLAIN)
    with error("Nothing is known of a.kernel"):
        fpq.quantize_params(params, PLAIN, uses={})
    with error("a.kernel is a shape without values"):
        fpq.quantize_params({"a": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}, PLAIN)
    with error("leaves every parameter as it is"):
        fpq.quantize_params({"a": {"kernel": jnp.ones((0, 8))}}, PLAIN)
    for more in ({"bits": 5.0}, {"embedding": "e4m3"}, {"head": "e4m3"}):
        with error(f"has {next(iter(more))}, which is for python -m fpq_jax.quantize"):
            fpq.quantize_params(params, replace(PLAIN, **more))
    with error("a.kernel is traced, and GPTQ is not to be"):
        jax.jit(lambda p: fpq.quantize_params(p, PLAIN, {"a.kernel": jnp.eye(16)}))(params)
    small = fpq.quantize_params(params, PLAIN)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda p: fpq.quantize_params(p, PLAIN))(params), small)
    again = fpq.quantize_params(small, PLAIN.with_rule("a.kernel"))  # it was done before
    jax.tree.map(np.testing.assert_array_equal, again, small)


def test_blocks_that_a_rule_leaves_and_parts_whose_rules_are_done():
    block = lambda p, x: jnp.tanh(x @ p["kernel"])
    blocks = [(block, {"kernel": _normal(i, 16, 16) / 4}) for i in range(3)]
    (first, left), (second, done), _ = fpq.quantize_blocks(blocks, [X], PLAIN.with_rule("0.*", quantize=False))
    assert first["kernel"] is blocks[0][1]["kernel"] and left.left["0.kernel"].startswith("the recipe's rule '0.*'")
    assert isinstance(second["kernel"], fpq.QTensor) and done.results[0].name == "1.kernel"
    with pytest.raises(fpq.FpqError, match="leaves every parameter of every block"):
        list(fpq.quantize_blocks(blocks, [X], PLAIN.with_rule("*", quantize=False)))
    recipe = PLAIN.with_rule("0.*", weight={"format": "e4m3", "constraint": None, "group_size": "channel"})
    params, apply = [p for _, p in blocks], lambda p, x: block(p[2], block(p[1], block(p[0], x)))
    for part in ("0.*", "[12].*"):
        params = fpq.quantize_params(params, recipe, fpq.collect_hessians(apply, params, [X], recipe, only=part))
    assert [p["kernel"].spec.format for p in params] == [fpq.E4M3, fpq.E2M1, fpq.E2M1]

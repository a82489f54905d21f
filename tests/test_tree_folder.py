"""Any tree in and out: by ``save`` and ``load``, by somebody's own Orbax manager, and onto its devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import fpq_jax as fpq

RECIPE = fpq.Recipe.load("w4a8-fp-m2-lorc").with_group_size(8)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _params():
    return {
        "layers": [{"kernel": _normal(1, 16, 12)}, {"kernel": _normal(2, 12, 8)}],
        "bias": _normal(3, 8),
        "n": jnp.int32(2),
    }


def _equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_tree_comes_back_by_its_abstract_form_its_values_or_its_init(tmp_path):
    params, small = _params(), fpq.quantize_params(_params(), RECIPE)
    fpq.save(tmp_path / "tree", small)
    for like in (jax.eval_shape(_params), params, _params, small):
        _equal(fpq.load(tmp_path / "tree", like=like), small)
    # unquantized trees, and a single leaf
    fpq.save(tmp_path / "plain", params)
    _equal(fpq.load(tmp_path / "plain", like=_params), params)
    fpq.save(tmp_path / "leaf", small["layers"][0]["kernel"])
    _equal(fpq.load(tmp_path / "leaf", like=_normal(1, 16, 12)), small["layers"][0]["kernel"])


def test_what_does_not_fit_is_said(tmp_path, tiny_llama):
    small, folder = fpq.quantize_params(_params(), RECIPE), tmp_path / "tree"
    fpq.save(folder, small)
    error = lambda message: pytest.raises(fpq.FpqError, match=message)
    with error("is not empty"):
        fpq.save(folder, small)
    with error("holds a tree; say its structure"):
        fpq.load(folder)
    with error("to which weights does not apply"):
        fpq.load(folder, like=_params, weights="fp8")
    with error(r"layers.1.kernel has shape \(12, 8\) there and \(8, 12\) in the tree"):
        fpq.load(folder, like={**_params(), "layers": [{"kernel": _normal(1, 16, 12)}, {"kernel": _normal(2, 8, 12)}]})
    with error("does not fit the tree: bias is not in it|it has bias"):
        fpq.load(folder, like={**{k: v for k, v in _params().items() if k != "bias"}, "gain": jnp.ones(8)})
    with error("is a model of fpq_jax's own"):
        fpq.load(tiny_llama, like=_params)
    with error("holds a tree of another model"):
        from fpq_jax._checkpoints.sources import open_model

        open_model(folder)
    with error("random key"):
        fpq.save(tmp_path / "rng", nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    with error("nothing to save"):
        fpq.save(tmp_path / "empty", {"f": jnp.tanh})
    with error("Two leaves of the tree have the path a.b"):
        fpq.save(tmp_path / "twice", {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tiny", "tree"]


@pytest.mark.parametrize("damage", ["version", "axes", "cut", "array"])
def test_damage_is_said(tmp_path, damage):
    folder = tmp_path / "tree"
    fpq.save(folder, fpq.quantize_params(_params(), RECIPE))
    manifest = json.loads((folder / "fpq.json").read_text())
    if damage == "version":
        manifest["version"] = 99
    elif damage == "axes":
        manifest["tree"]["quantized"]["layers.0.kernel"]["axes"] = {"kinds": 3}
    (folder / "fpq.json").write_text(json.dumps(manifest)[: 40 if damage == "cut" else None])
    if damage == "array":
        for file in (folder / "params" / "tree").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(fpq.FpqError, match=str(folder)):
        fpq.load(folder, like=_params)


def test_a_training_loops_own_manager_holds_a_quantized_tree(tmp_path):
    small = fpq.quantize_params(_params(), RECIPE)
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave({"params": small, "step": jnp.int32(step)}))
        manager.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": small, "step": jnp.int32(0)})
        found = manager.restore(2, args=ocp.args.StandardRestore(shapes))
        assert manager.all_steps() == [1, 2]
    _equal(found["params"], small)
    assert int(found["step"]) == 2

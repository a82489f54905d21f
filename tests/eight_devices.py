"""What test_sharding runs in a process of its own, which has eight devices: a mesh gives what one device gives.

In float32, where the sums of several devices differ from one's by rounding alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, random_tensors, write_checkpoint
from flax import nnx

from fpq_jax import FpqError, Generator, QuantSpec, Sampling, load, lorc, make_mesh, prepare, quantize_array, save
from fpq_jax._algorithms.fp8_table import quantize_table
from fpq_jax.models.parameters import HEAD_KERNEL, TABLE, params_of, with_params

# key-value heads: LLaMA's 2, OPT's 4
CONFIGS = {name: c | {"num_hidden_layers": 1} for name, c in (("llama", TINY_CONFIG), ("opt", OPT_CONFIG))}
MESHES = {"llama": (4, 2), "opt": (2, 4)}
PROMPTS = [[256, 5, 9, 77], [256, 8], [256, *range(40)], [256, 1, 2, 3, 4, 5, 6], [1, 2], [3, 4, 5], [7], [9] * 20]
M2 = QuantSpec(group_size=32, constraint="m2")
INTEGERS = QuantSpec(format="int8-asym", group_size="channel", activation="int8-asym")
QUANTIZED = {"llama-m2": M2, "opt-m2": M2, "llama-int": INTEGERS}
_quantize = jax.jit(quantize_array, static_argnums=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model, as it is and quantized, written by one device."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        write_checkpoint(root / name, config, random_tensors(config))
    for name, spec in QUANTIZED.items():
        params = params_of(model := load(root / name.partition("-")[0]))
        for path in [p for p in params if p.startswith("layers.") and p.endswith("kernel")]:
            params[path] = lorc(params[path], _quantize(params[path], spec), rank=2)
        if spec is M2:
            params[TABLE] = quantize_table(params[TABLE], spec.activation)
            if HEAD_KERNEL in params:
                params[HEAD_KERNEL] = quantize_table(params[HEAD_KERNEL].T, spec.activation)
        save(root / name, with_params(model, params))
    return root


def logits(model):
    graph, state = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (3, 20)))
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))


@pytest.mark.parametrize(("name", "weights", "kv_cache"), [("llama", "fp8", "float8"), ("opt", "packed", "model")])
def test_generation_equals_one_devices(folders, name, weights, kv_cache):
    folder = folders / f"{name}-m2"
    one, many = load(folder, weights=weights), load(folder, weights=weights, mesh=make_mesh(*MESHES[name]))
    expected, got = (Generator(m, kv_cache=kv_cache)(PROMPTS, max_new_tokens=12) for m in (one, many))
    assert got.tokens == expected.tokens and got.cache_bytes == expected.cache_bytes


def test_logits_of_integers_which_xla_divides_alone_equal_one_devices(folders):
    expected = logits(load(folders / "llama-int"))
    ready = load(folders / "llama-int", weights="fp8", mesh=make_mesh(4, 2))
    np.testing.assert_allclose(logits(ready), expected, atol=2e-6 * np.abs(expected).max())


def test_sampling_three_rows_that_data_does_not_divide(folders):
    """A model that was not prepared, from a Hugging Face folder."""
    options = dict(max_new_tokens=12, sampling=Sampling(temperature=3.0, top_p=0.9), seed=3)
    one, many = load(folders / "llama"), load(folders / "llama", mesh=make_mesh(4, 2))
    assert Generator(many)(PROMPTS[:3], **options).tokens == Generator(one)(PROMPTS[:3], **options).tokens


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_a_checkpoint_is_restored_straight_onto_any_mesh(folders, sizes):
    folder = folders / "llama-m2"
    one, many = params_of(load(folder)), params_of(load(folder, mesh=make_mesh(*sizes)))
    assert jax.tree.structure(one) == jax.tree.structure(many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert len(b.sharding.device_set) == sizes[0] * sizes[1]
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    parts = lambda array: array.addressable_shards[0].data.size * sizes[1]
    for path in ("layers.0.self_attn.q_proj.kernel", "layers.0.mlp.down_proj.kernel", HEAD_KERNEL, TABLE):
        assert parts(many[path].codes) == many[path].codes.size


def test_a_model_on_a_mesh_is_saved_as_any_other(folders, tmp_path):
    mesh = make_mesh(2, 2)
    save(tmp_path / "again", load(folders / "opt-m2", mesh=mesh))
    one, again = params_of(load(folders / "opt-m2")), params_of(load(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, one, again)


def test_what_cannot_be_divided_is_said(folders):
    for folder in ("llama", "llama-m2"):
        with pytest.raises(
            FpqError, match="num_key_value_heads is 2, which the mesh's model axis of 4 does not divide"
        ):
            load(folders / folder, mesh=make_mesh(model=4))
    ready = load(folders / "llama-m2", weights="fp8")
    with pytest.raises(FpqError, match="prepared for other devices cannot be divided; load it without weights"):
        prepare(ready, mesh=make_mesh(model=2))


def test_a_sharded_tree_is_quantized_run_saved_and_loaded_as_it_lies(tmp_path):
    import fpq_jax as fpq

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    on = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {"up": {"kernel": draw(1, 64, 4, 32)}, "down": {"kernel": draw(2, 4, 32, 64)}, "norm": jnp.ones(64)}
    where = {"up": {"kernel": on(None, "model")}, "down": {"kernel": on("model", None, None)}, "norm": on()}
    apply = lambda p, x: jnp.einsum(
        "bnh,nhd->bd", jnp.tanh(jnp.einsum("bd,dnh->bnh", x * p["norm"], p["up"]["kernel"])), p["down"]["kernel"]
    )
    recipe, x = fpq.Recipe.load("w4a8-fp-m2-lorc").with_group_size(32), draw(3, 256, 64)
    results = []
    for tree, rows in ((params, x), (jax.device_put(params, where), jax.device_put(x, on("data")))):
        hessians = fpq.collect_hessians(apply, tree, [rows], recipe)
        small = fpq.quantize_params(tree, recipe, hessians)
        results.append((small, np.asarray(jax.jit(fpq.quantized(apply))(small, rows))))
    (one, expected), (many, got) = results
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True)]
    assert min(same) > 0.9
    up, down = many["up"]["kernel"], many["down"]["kernel"]
    assert up.codes.sharding.spec[0] == "model" and down.codes.sharding.spec[1] == "model"
    assert up.low_rank.b.sharding.spec[1] == "model" and down.low_rank.a.sharding.spec[0] == "model"
    fpq.save(tmp_path / "tree", many)
    shapes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, where)
    for like in (shapes, many):
        again = fpq.load(tmp_path / "tree", like=like)
        for a, b in zip(*map(jax.tree.leaves, (again, many)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)

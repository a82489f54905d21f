import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, random_tensors, write_checkpoint
from safetensors.numpy import save_file

from fpq_jax import FpqError, load
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax.models.parameters import params_of

NAME = "model.layers.1.mlp.up_proj.weight"


def test_shards_with_an_index_equal_one_file(tmp_path):
    tensors = random_tensors(TINY_CONFIG)
    one = write_checkpoint(tmp_path / "one", TINY_CONFIG, tensors)
    many = write_checkpoint(tmp_path / "many", TINY_CONFIG, tensors)
    (many / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, many / file)
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    first, second = (HfCheckpoint(folder).read(jnp.float32) for folder in (one, many))
    assert all((first[path] == second[path]).all() for path in first) and len(first) == len(second)
    (many / "model-00001.safetensors").unlink()
    with pytest.raises(FpqError, match=r"lacks model-00001\.safetensors"):
        HfCheckpoint(many)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_dtype_is_read_and_is_the_default(tmp_path, dtype):
    tensors = {name: t.astype(dtype) for name, t in random_tensors(TINY_CONFIG).items()}
    folder = write_checkpoint(tmp_path / "m", TINY_CONFIG, tensors)
    model = load(folder)
    assert {leaf.dtype for leaf in params_of(model).values()} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(params_of(load(folder, dtype="float32"))["norm.scale"], tensors["model.norm.weight"])


def test_a_tied_head_that_is_stored_and_rotary_tables_are_ignored(tmp_path):
    config = {**TINY_CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    assert load(write_checkpoint(tmp_path / "m", config, tensors)).lm_head is None


def test_all_mismatches_are_listed_at_once(tmp_path):
    tensors = random_tensors(TINY_CONFIG)
    for name in ("model.norm.weight", "lm_head.weight"):
        del tensors[name]
    tensors["model.layers.0.mlp.extra.weight"] = np.zeros(3, np.float32)
    tensors[NAME] = tensors[NAME][:-1].copy()
    folder = write_checkpoint(tmp_path / "m", TINY_CONFIG, tensors)
    with pytest.raises(FpqError) as caught:
        HfCheckpoint(folder)
    message = str(caught.value)
    assert "missing: lm_head.weight, model.norm.weight" in message
    assert "unexpected: model.layers.0.mlp.extra.weight" in message
    assert f"{NAME} [79, 48] instead of [80, 48]" in message


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_values_that_are_not_finite_name_their_tensor(tmp_path, value, kind):
    tensors = random_tensors(TINY_CONFIG)
    tensors[NAME][3, 5] = value
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path / "m", TINY_CONFIG, tensors))
    with pytest.raises(FpqError, match=f"{NAME}.*{kind}"):
        checkpoint.read(jnp.float32)


@pytest.mark.parametrize("config", [TINY_CONFIG, OPT_CONFIG])
@pytest.mark.parametrize("tied", [True, False])
def test_names_of_a_base_model_are_taken_as_the_whole_models(tmp_path, config, tied):
    config = {**config, "tie_word_embeddings": tied}
    tensors = random_tensors(config)
    whole = HfCheckpoint(write_checkpoint(tmp_path / "whole", config, tensors)).read(jnp.float32)
    bare = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert not bare.keys() & (tensors.keys() - {"lm_head.weight"}) and ("lm_head.weight" in bare) is not tied
    read = HfCheckpoint(write_checkpoint(tmp_path / "bare", config, bare)).read(jnp.float32)
    assert read.keys() == whole.keys() and all((read[path] == whole[path]).all() for path in read)


def test_messages_name_tensors_as_they_are_stored(tmp_path):
    bare = {name.removeprefix("model."): t for name, t in random_tensors(TINY_CONFIG).items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)
    stored = NAME.removeprefix("model.")
    folder = tmp_path / "m"
    for value, dtype, message in ((np.nan, jnp.float32, "in .* holds NaN"), (1e6, jnp.float16, "does not fit float16")):
        bare[stored][3, 5] = value
        checkpoint = HfCheckpoint(write_checkpoint(folder, TINY_CONFIG, bare))
        with pytest.raises(FpqError, match=f"Tensor {stored} {message}"):
            checkpoint.read(dtype)
    bare[stored] = bare[stored][:-1].astype(np.float64)
    bare["extra.weight"] = np.zeros(3, np.float32)
    del bare["norm.weight"]
    with pytest.raises(FpqError) as caught:
        HfCheckpoint(write_checkpoint(folder, TINY_CONFIG, bare))
    assert str(caught.value).endswith(
        "; missing: model.norm.weight; unexpected: extra.weight; "
        f"not as config.json says: {stored} [79, 48] instead of [80, 48], {stored} stored as F64."
    )


def test_what_a_tied_model_stores_of_its_head(tmp_path):
    config = {**TINY_CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    plain = HfCheckpoint(write_checkpoint(tmp_path / "plain", config, tensors))
    embedding = tensors["model.embed_tokens.weight"]
    both = HfCheckpoint(write_checkpoint(tmp_path / "both", config, tensors | {"lm_head.weight": embedding}))
    alone = {name: value for name, value in tensors.items() if name != "model.embed_tokens.weight"}
    head = HfCheckpoint(write_checkpoint(tmp_path / "head", config, alone | {"lm_head.weight": embedding}))
    assert plain.digest() == both.digest() == head.digest()
    for other in (embedding * 2, embedding[:-1], embedding.astype(np.float16)):
        folder = write_checkpoint(
            tmp_path / str(len(list(tmp_path.iterdir()))), config, tensors | {"lm_head.weight": other}
        )
        with pytest.raises(FpqError, match=r"has a lm_head\.weight that is not the embedding; set tie_word_embeddings"):
            HfCheckpoint(folder).read(np.float32, "embed_tokens")


def test_buffers_that_some_checkpoints_carry_are_ignored(tmp_path):
    tensors = random_tensors(TINY_CONFIG)
    names = ("model.layers.1.self_attn.rotary_emb.cos_cached", "model.rotary_emb.inv_freq", "rotary_emb.sin_cached")
    more = {name: np.ones(3, np.float32) for name in names}
    HfCheckpoint(write_checkpoint(tmp_path / "llama", TINY_CONFIG, tensors | more))
    version = {"model.decoder.version": np.ones(1, np.float32)}
    HfCheckpoint(write_checkpoint(tmp_path / "opt", OPT_CONFIG, random_tensors(OPT_CONFIG) | version))


def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path):
    folder = write_checkpoint(tmp_path / "m", {**TINY_CONFIG, "num_hidden_layers": 2**30}, random_tensors(TINY_CONFIG))
    with pytest.raises(FpqError, match=r"num_hidden_layers is 1073741824, but .* has only 21 tensors"):
        HfCheckpoint(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[]", "does not hold a JSON object"),
    ],
)
def test_json_that_is_none_is_said(tmp_path, content, said):
    folder = write_checkpoint(tmp_path / "m", TINY_CONFIG, random_tensors(TINY_CONFIG))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FpqError, match=rf"config\.json {said}"):
        HfCheckpoint(folder)


def test_a_file_without_tensors_lacks_them_all(tmp_path):
    with pytest.raises(FpqError, match=r"missing: lm_head\.weight, model\.embed_tokens\.weight"):
        HfCheckpoint(write_checkpoint(tmp_path / "m", TINY_CONFIG, {}))


def test_broken_folders_are_told_apart(tmp_path, tiny_llama):
    with pytest.raises(FpqError, match="no model folder"):
        HfCheckpoint(tmp_path / "absent")
    with pytest.raises(FpqError, match=r"no config\.json"):
        HfCheckpoint(tmp_path)
    weights = tiny_llama / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 10, 100, 3, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(FpqError, match=r"model\.safetensors is truncated"):
            HfCheckpoint(tiny_llama)
    weights.unlink()
    with pytest.raises(FpqError, match=r"lacks model\.safetensors"):
        HfCheckpoint(tiny_llama)
    (tiny_llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FpqError, match="not a safetensors index"):
        HfCheckpoint(tiny_llama)
    (tiny_llama / "config.json").write_text("{")
    with pytest.raises(FpqError, match="not valid JSON"):
        HfCheckpoint(tiny_llama)

"""An embedding and a head in FP8: the numbers, and through every command."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, mostly_full, random_tensors, write_checkpoint

from fpq_jax import FpqError, Generator, QTensor, Recipe, dequantize, evaluate, export, linear, load, prepare, quantize
from fpq_jax._algorithms.fp8_table import quantize_table
from fpq_jax._numerics.formats import E4M3
from fpq_jax._numerics.qtensor import take_outputs
from fpq_jax._pipeline.job import JobOptions, open_job
from fpq_jax.models.parameters import params_of

TIED = TINY_CONFIG | {"tie_word_embeddings": True}


def test_values_are_the_nearest_and_exact_in_bfloat16():
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((40, 24)) * np.exp(4 * rng.standard_normal((40, 1)))).astype(np.float32)
    table[3] = 0
    table[4] *= 1e-30
    q = quantize_table(jnp.asarray(table), E4M3)
    scale = np.asarray(q.row_scale, np.float64)
    assert (np.frexp(scale)[0] == 0.5).all() and q.shape == (24, 40)
    largest = np.abs(table).max(axis=1, keepdims=True)
    small = np.arange(40) != 4  # whose scale is the smallest that there is
    assert (largest <= 448 * scale).all() and (2 * largest > 448 * scale)[(largest[:, 0] > 0) & small].all()
    expected = (table / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    found = np.asarray(dequantize(q)).T
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))
    tokens = jnp.array([[3, 4, 39], [0, 1, 1]])
    np.testing.assert_array_equal(take_outputs(q, tokens, jnp.float32), found[tokens])
    x = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    weight_only = quantize_table(jnp.asarray(table), None)
    np.testing.assert_allclose(linear(x, weight_only), np.asarray(x) @ found.T, rtol=2e-5, atol=1e-4)


CONFIGS = [TIED, TINY_CONFIG, OPT_CONFIG | {"word_embed_proj_dim": 24}]


@pytest.mark.parametrize("config", mostly_full(CONFIGS, 1))
def test_every_command_knows_it(config, tmp_path, text_file, capsys):
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{method: round, weight: {constraint: m2, group_size: 16}, embedding: e4m3, head: e4m3}")
    out = tmp_path / "out"
    quantize.main(quantize.Options(model=str(folder), recipe=str(recipe), calibration=str(text_file), num_samples=4,
                                   max_windows=2, output=out))  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    params = params_of(load(out))
    table, head = params["embed_tokens.embedding"], params.get("lm_head.kernel")
    assert isinstance(table, QTensor) and (head is None) == config.get("tie_word_embeddings", True)
    assert head is None or isinstance(head, QTensor)
    outer = [leaf for path, leaf in params.items() if isinstance(leaf, QTensor) and not path.startswith("layers.")]
    assert len(outer) == 1 + (head is not None) and report["bits_per_weight"] < 7
    assert report["bytes"]["quantized"] < report["bytes"]["original"] / 2

    # evaluated again, and as a model in memory
    evaluate.main(evaluate.Options(model=str(out), report=tmp_path / "again.json"))
    again = json.loads((tmp_path / "again.json").read_text())["perplexity"]
    (spec,) = again
    assert again[spec]["quantized"] == report["perplexity"][spec]["quantized"]
    tokens = jnp.arange(40).reshape(2, 20)
    logits = load(out)(tokens)
    np.testing.assert_allclose(prepare(load(out))(tokens), logits, rtol=1e-4, atol=1e-4)
    (continued,) = Generator(load(out, weights="fp8"))([[1, 2, 3]], max_new_tokens=3).tokens
    assert len(continued) == 3

    # others read what it stands for; our own format keeps it as it is
    export.main(export.Options(model=str(out), format="safetensors", output=tmp_path / "own"))
    assert isinstance(params_of(load(tmp_path / "own"))["embed_tokens.embedding"], QTensor)
    np.testing.assert_array_equal(load(tmp_path / "own")(tokens), logits)
    export.main(export.Options(model=str(out), format="fp8", output=tmp_path / "fp8"))
    theirs = params_of(load(tmp_path / "fp8"))
    np.testing.assert_array_equal(theirs["embed_tokens.embedding"], dequantize(table).T)
    assert head is None or bool((theirs["lm_head.kernel"] == dequantize(head)).all())


def test_a_tied_pair_has_both_or_none(tmp_path, text_file):
    folder = write_checkpoint(tmp_path / "model", TIED, random_tensors(TIED))
    options = JobOptions(model=str(folder), calibration=str(text_file))
    with pytest.raises(FpqError, match="must set both embedding and head to e4m3, or neither"):
        open_job(options, [Recipe.from_dict({"embedding": "e4m3"})])

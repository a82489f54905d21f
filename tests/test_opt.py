"""OPT against Hugging Face's torch model, in float32."""

import numpy as np
import pytest
from conftest import (
    OPT_CONFIG,
    assert_a_cache_gives_the_same_logits,
    assert_logits_equal_hugging_faces,
    mostly_full,
    write_checkpoint,
)

from fpq_jax import FpqError
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax.models.opt import OptConfig

POST_NORM = {"do_layer_norm_before": False}
PROJECTION = {"word_embed_proj_dim": 24}
VARIANTS = {
    "pre_norm": {},
    "350m": {**POST_NORM, **PROJECTION},
    "post_norm": POST_NORM,
    "projection": PROJECTION,
    "gelu_without_biases": {"activation_function": "gelu", "enable_bias": False},
    "norms_without_gains": {"layer_norm_elementwise_affine": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "untied": {"tie_word_embeddings": False},
    "odd_sizes": {"vocab_size": 259, "ffn_dim": 37, "num_hidden_layers": 3, "max_position_embeddings": 50},
}


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_faces(tmp_path, variant):
    assert_logits_equal_hugging_faces(tmp_path / "model", {**OPT_CONFIG, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", mostly_full(["pre_norm", "350m"], 1))
def test_a_cache_gives_the_same_logits_in_pieces(tmp_path, variant):
    assert_a_cache_gives_the_same_logits(tmp_path / "model", {**OPT_CONFIG, **VARIANTS[variant]})


def test_config_round_trips_through_json():
    for variant in VARIANTS.values():
        config = OptConfig.from_hf({**OPT_CONFIG, **variant})
        assert OptConfig.from_hf(config.to_hf()) == config
        assert "has_final_layer_norm" not in config.to_hf()


@pytest.mark.parametrize(("hidden", "rank"), [(768, 8), (2048, 16), (4096, 32), (5120, 40), (7168, 56)])
def test_lorc_ranks_are_the_papers(hidden, rank):
    assert OptConfig.from_hf({**OPT_CONFIG, "hidden_size": hidden}).lorc_rank == rank


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "swish"}, "activation_function 'swish'"),
        ({"scale_embeddings": True}, "scale_embeddings"),
        ({"learned_embeddings": False}, "learned_embeddings"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"ffn_dim": None}, "lacks ffn_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'"),
        ({"activation_function": ["relu"]}, "activation_function"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with .gptq. are not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, said):
    folder = write_checkpoint(tmp_path / "model", {**OPT_CONFIG, **change}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(FpqError, match=said):
        HfCheckpoint(folder)

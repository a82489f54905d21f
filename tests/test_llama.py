"""LLaMA against Hugging Face's torch model, in float32."""

import numpy as np
import pytest
from conftest import (
    TINY_CONFIG,
    assert_a_cache_gives_the_same_logits,
    assert_logits_equal_hugging_faces,
    mostly_full,
    write_checkpoint,
)

from fpq_jax import FpqError
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax.models.llama import LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi_query_head_dim": {"num_key_value_heads": 1, "head_dim": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    "llama3_rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 32},
    "rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "dynamic_rope": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn_rope": {"rope_scaling": YARN, "rope_theta": 300.0},
    "yarn_rope_mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}},
    "yarn_rope_attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0}},
    "odd_sizes": {"vocab_size": 259, "intermediate_size": 37, "num_hidden_layers": 3},
}


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_faces(tmp_path, variant):
    assert_logits_equal_hugging_faces(tmp_path / "model", {**TINY_CONFIG, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", mostly_full(["grouped", "llama3_rope"], 1))
def test_a_cache_gives_the_same_logits_in_pieces(tmp_path, variant):
    assert_a_cache_gives_the_same_logits(tmp_path / "model", {**TINY_CONFIG, **VARIANTS[variant]})


def test_config_round_trips_through_json():
    for variant in VARIANTS.values():
        config = LlamaConfig.from_hf({**TINY_CONFIG, **variant})
        assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "lacks rope_scaling.high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "low_freq_factor 1 is not below high_freq_factor 0.5"),
        ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "rope_parameters and rope_scaling say different things"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "of single layers .full_attention. are not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be a JSON object"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0, at most 1"),
        ({"rms_norm_eps": "1e-6x"}, "rms_norm_eps is '1e-6x'"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"vocab_size": 2**40}, "vocab_size is 1.1e.12; it must be at most 2147483647"),
        ({"vocab_size": True}, "vocab_size is True; it must be a positive whole number"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with .gptq. are not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, said):
    folder = write_checkpoint(tmp_path / "model", {**TINY_CONFIG, **change}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(FpqError, match=said):
        HfCheckpoint(folder)

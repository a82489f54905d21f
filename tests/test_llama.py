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
VARIANTS = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi_query_head_dim": {"num_key_value_heads": 1, "head_dim": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    "llama3_rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 32},
    "rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
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
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
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

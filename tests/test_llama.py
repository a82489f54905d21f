"""LLaMA against Hugging Face's torch model, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint
from fpq_jax.models import LlamaConfig, open_checkpoint

from fpq_jax import FpqError, load

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_faces(tmp_path, variant):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    import transformers

    config = {**TINY_CONFIG, **VARIANTS[variant]}
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (3, 50))
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(jax.jit(lambda t: load(folder)(t))(jnp.asarray(tokens)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["grouped", "llama3_rope"])
def test_a_cache_gives_the_same_logits_in_pieces(tmp_path, variant):
    config = {**TINY_CONFIG, **VARIANTS[variant]}
    model = load(write_checkpoint(tmp_path / "model", config, random_tensors(config)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 20)))
    whole = model(tokens)
    cache = model.init_cache(2, 24, jnp.float32)
    for start, end in ((0, 7), (7, 8), (8, 20)):
        logits, cache = model(tokens[:, start:end], cache, jnp.int32(start))
        np.testing.assert_allclose(logits, whole[:, start:end], atol=2e-5 * float(jnp.abs(whole).max()))


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
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, said):
    folder = write_checkpoint(tmp_path / "model", {**TINY_CONFIG, **change}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(FpqError, match=said):
        open_checkpoint(folder)

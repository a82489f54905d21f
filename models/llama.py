"""LLaMA in Flax NNX: every checkpoint of Hugging Face's ``LlamaForCausalLM``.

Attribute names follow the checkpoint's, so a parameter's path is its Hugging Face name in Flax's words.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax.models.config import ConfigValues
from fpq_jax.models.decoder import Decoder
from fpq_jax.models.kv_cache import attend
from fpq_jax.models.layers import Block, Embedding, Linear, RMSNorm, pad_rows, split_heads
from fpq_jax.models.rotary import attention_factor, inverse_frequencies, read_rotary, rotate


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What the forward pass needs of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a ``config.json`` (transformers 4 or 5); FpqError names a key or value that is not supported."""
        values = ConfigValues(config)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        values.require(*required)
        sizes = {key: values.count(key) for key in required}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        kv_heads = values.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise FpqError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        values.choice("hidden_act", ("silu", "swish"), "silu")
        head_dim = values.count("head_dim", max(1, hidden // heads))
        if head_dim % 2:
            raise FpqError(f"config.json: head_dim is {head_dim}; rotary positions need an even one.")
        positions = values.count("max_position_embeddings", 2048)
        theta, scaling = read_rotary(config, positions)
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=values.number("rms_norm_eps", 1e-6, most=1.0),
            attention_bias=values.flag("attention_bias", False),
            mlp_bias=values.flag("mlp_bias", False),
            tie_word_embeddings=values.flag("tie_word_embeddings", False),
            rope_theta=theta,
            rope_scaling=scaling,
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that ``from_hf`` reads back to the same config."""
        values = dataclasses.asdict(self)
        scaling = dict(values.pop("rope_scaling"))
        extra = {"rope_scaling": scaling} if scaling else {}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **values, **extra}

    @property
    def lorc_rank(self) -> int:
        """The paper's LoRC rank, the same for every LLaMA."""
        return 8


class Attention(Block):
    """Grouped-query attention with rotary positions."""

    MERGED: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        rotary = config.rope_theta, config.rope_scaling
        self.frequencies = tuple(inverse_frequencies(config.head_dim, *rotary).tolist())
        self.rotary_factor = attention_factor(config.rope_scaling)
        query, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        options: Any = dict(use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.q_proj = Linear(config.hidden_size, query, **options)
        self.k_proj = Linear(config.hidden_size, kv, **options)
        self.v_proj = Linear(config.hidden_size, kv, **options)
        self.qkv_proj = None
        self.o_proj = Linear(query, config.hidden_size, **options)
        self.implementation = "xla"

    def __call__(self, x, positions, cache, fresh):
        projected = self.project(x, "qkv_proj")
        query, key, value = (split_heads(y, self.head_dim, len(positions)) for y in projected)
        with jax.named_scope("attention"):
            frequencies = jnp.asarray(self.frequencies, jnp.float32)
            query, key = (rotate(y, positions, frequencies, self.rotary_factor) for y in (query, key))
            attention, cache = attend(
                query, key, value, positions, cache, fresh=fresh, implementation=self.implementation
            )
        return self.o_proj(pad_rows(attention, len(x))), cache


class MLP(Block):
    """The gated feed-forward network (SwiGLU)."""

    MERGED: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options: Any = dict(use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **options)
        self.gate_up_proj = None
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x):
        gate, up = self.project(x, "gate_up_proj")
        return self.down_proj(nnx.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """One block: hidden states in, hidden states out."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, positions, cache=None, fresh=False):
        attention, cache = self.self_attn(self.input_layernorm(x), positions, cache, fresh)
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(Decoder):
    """The whole model: ``model(tokens)`` gives logits; ``embed``, ``layers`` and ``head`` are its parts in order."""

    NAMES = (
        (r"embed_tokens\.embedding", "model.embed_tokens.weight"),
        (r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.kernel", r"model.layers.\1.\2.\3.weight"),
        (r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.bias", r"model.layers.\1.\2.\3.bias"),
        (r"layers\.(\d+)\.(\w+)\.scale", r"model.layers.\1.\2.weight"),
        (r"norm\.scale", "model.norm.weight"),
        (r"lm_head\.kernel", "lm_head.weight"),
    )
    # rotary tables of old checkpoints; a head that is tied
    IGNORED = (r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)", r"lm_head\.weight")
    EMBEDDING = ("embed_tokens.",)
    DIVISIBLE = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    SPLIT: ClassVar = {
        "outputs": r"(q|k|v|qkv|gate|up|gate_up)_proj|lm_head|embed_tokens",
        "inputs": r"(o|down)_proj",
    }
    Config = LlamaConfig
    BLOCKS = (Attention, MLP)

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids to the first layer's input."""
        return self.embed_tokens(tokens)

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The last layer's output to logits."""
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

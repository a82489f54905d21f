"""LLaMA in Flax NNX: every checkpoint of Hugging Face's ``LlamaForCausalLM``.

Attribute names follow the checkpoint's, so a parameter's path is its Hugging Face name in Flax's words.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax.models.config import check_counts
from fpq_jax.models.decoder import Decoder
from fpq_jax.models.kv_cache import attend
from fpq_jax.models.layers import Block, Embedding, Linear, RMSNorm, pad_rows, rotate, split_heads


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
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_counts(config, required, ("num_key_value_heads", "head_dim", "max_position_embeddings"))
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise FpqError(
                f"config.json: hidden_act {config['hidden_act']!r} is not supported for LLaMA; only 'silu' is."
            )
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise FpqError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        # transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        if kind not in ("default", "linear", "llama3"):
            raise FpqError(f"config.json: rope scaling {kind!r} is not supported; default, linear and llama3 are.")
        if kind == "llama3":
            rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}[kind]
        if missing := [key for key in needed if rope.get(key) is None]:
            raise FpqError(f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}.")
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise FpqError("config.json: partial_rotary_factor is not supported for LLaMA.")
        return cls(
            **{key: config[key] for key in required},
            num_key_value_heads=kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope_theta=float(theta),
            rope_scaling=() if kind == "default" else (("rope_type", kind), *((key, rope[key]) for key in needed)),
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

    def inverse_frequencies(self) -> Float[np.ndarray, " half"]:
        """Rotary frequencies per pair of channels, float32, scaled as ``rope_scaling`` says."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = (np.float32(1.0) / np.power(np.float32(self.rope_theta), exponents)).astype(np.float32)
        scaling = dict(self.rope_scaling)
        if scaling.get("rope_type") == "linear":
            return (frequencies / np.float32(scaling["factor"])).astype(np.float32)
        if scaling.get("rope_type") == "llama3":
            return _llama3_frequencies(frequencies, *(scaling[key] for key in _LLAMA3_KEYS))
        return frequencies


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _llama3_frequencies(frequencies: np.ndarray, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """LLaMA 3.1's scaling: long wavelengths divided by ``factor``, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    keep = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * frequencies / factor + keep * frequencies).astype(np.float32)


class Attention(Block):
    """Grouped-query attention with rotary positions."""

    MERGED: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.frequencies = tuple(config.inverse_frequencies().tolist())
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
            query, key = rotate(query, positions, frequencies), rotate(key, positions, frequencies)
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
    IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
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

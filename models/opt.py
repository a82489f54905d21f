"""OPT in Flax NNX: every checkpoint of Hugging Face's ``OPTForCausalLM``, Galactica's and OPT-IML's among them.

Attribute names follow the checkpoint's, so a parameter's path is its Hugging Face name in Flax's words.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax.models.config import ConfigValues
from fpq_jax.models.decoder import Decoder
from fpq_jax.models.kv_cache import attend
from fpq_jax.models.layers import Block, Embedding, LayerNorm, Linear, pad_rows, split_heads

_POSITION_OFFSET = 2  # the first two rows of the table belong to fairseq's padding and are never used
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": nnx.relu, "gelu": partial(nnx.gelu, approximate=False)}
_LORC_SHARE = 128  # the paper's ranks 16, 32, 40, 56 are hidden / 128


@dataclass(frozen=True, kw_only=True)
class OptConfig:
    """What the forward pass needs of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int
    activation_function: str
    do_layer_norm_before: bool
    has_final_layer_norm: bool
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "OptConfig":
        """Read a ``config.json``; FpqError names a key or value that is not supported."""
        values = ConfigValues(config)
        required = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
        values.require(*required)
        sizes = {key: values.count(key) for key in required}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % heads:
            raise FpqError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
        if values.flag("scale_embeddings", False):
            raise FpqError("config.json: scale_embeddings is not supported for OPT.")
        if not values.flag("learned_embeddings", True):
            raise FpqError("config.json: learned_embeddings false is not supported; OPT learns its positions.")
        before = values.flag("do_layer_norm_before", True)
        return cls(
            **sizes,
            max_position_embeddings=values.count("max_position_embeddings", 2048),
            word_embed_proj_dim=values.count("word_embed_proj_dim", hidden),
            activation_function=values.choice("activation_function", _ACTIVATIONS, "relu"),
            do_layer_norm_before=before,
            has_final_layer_norm=before and not values.flag("_remove_final_layer_norm", False),
            enable_bias=values.flag("enable_bias", True),
            layer_norm_elementwise_affine=values.flag("layer_norm_elementwise_affine", True),
            tie_word_embeddings=values.flag("tie_word_embeddings", True),
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that ``from_hf`` reads back to the same config."""
        values = dataclasses.asdict(self)
        removed = not values.pop("has_final_layer_norm") and self.do_layer_norm_before
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            **values,
            "_remove_final_layer_norm": removed,
        }

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def lorc_rank(self) -> int:
        """The paper's LoRC rank for this model's size, at least 8 as for LLaMA."""
        return max(8, self.hidden_size // _LORC_SHARE)


class Attention(Block):
    """Multi-head attention with biases and without rotary positions."""

    MERGED: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: OptConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        options: Any = dict(use_bias=config.enable_bias, dtype=dtype, rngs=rngs)
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **options)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **options)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **options)
        self.qkv_proj = None
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **options)
        self.implementation = "xla"

    def __call__(self, x, positions, cache, fresh):
        projected = self.project(x, "qkv_proj")
        query, key, value = (split_heads(y, self.head_dim, len(positions)) for y in projected)
        with jax.named_scope("attention"):
            attention, cache = attend(
                query, key, value, positions, cache, fresh=fresh, implementation=self.implementation
            )
        return self.out_proj(pad_rows(attention, len(x))), cache


class DecoderLayer(nnx.Module):
    """One block: hidden states in, hidden states out; norms before each half, or (350m) behind it."""

    def __init__(self, config: OptConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.hidden_size, affine=config.layer_norm_elementwise_affine, dtype=dtype)
        options: Any = dict(use_bias=config.enable_bias, dtype=dtype, rngs=rngs)
        self.norm_before = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn_layer_norm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm()
        self.fc1 = Linear(config.hidden_size, config.ffn_dim, **options)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size, **options)

    def __call__(self, x, positions, cache=None, fresh=False):
        before = lambda norm, y: norm(y) if self.norm_before else y
        behind = lambda norm, y: y if self.norm_before else norm(y)
        attention, cache = self.self_attn(before(self.self_attn_layer_norm, x), positions, cache, fresh)
        x = behind(self.self_attn_layer_norm, x + attention)
        inner = _ACTIVATIONS[self.activation](self.fc1(before(self.final_layer_norm, x)))
        return behind(self.final_layer_norm, x + self.fc2(inner)), cache


class Opt(Decoder):
    """The whole model: ``model(tokens)`` gives logits; ``embed``, ``layers`` and ``head`` are its parts in order."""

    NAMES = (
        (r"embed_(tokens|positions)\.embedding", r"model.decoder.embed_\1.weight"),
        (r"project_(in|out)\.kernel", r"model.decoder.project_\1.weight"),
        (r"layers\.(\d+)\.((?:self_attn\.)?\w+)\.(?:kernel|scale)", r"model.decoder.layers.\1.\2.weight"),
        (r"layers\.(\d+)\.((?:self_attn\.)?\w+)\.bias", r"model.decoder.layers.\1.\2.bias"),
        (r"final_layer_norm\.scale", "model.decoder.final_layer_norm.weight"),
        (r"final_layer_norm\.bias", "model.decoder.final_layer_norm.bias"),
        (r"lm_head\.kernel", "lm_head.weight"),
    )
    IGNORED = (r"(.+\.)?decoder\.version", r"lm_head\.weight")  # of fairseq's; a head that is tied
    EMBEDDING = ("embed_", "project_in.")
    DIVISIBLE = ("num_attention_heads", "ffn_dim")
    SPLIT: ClassVar = {"outputs": r"(q|k|v|qkv)_proj|fc1|lm_head|embed_tokens", "inputs": r"out_proj|fc2"}
    Config = OptConfig
    BLOCKS = (Attention,)

    def __init__(self, config: OptConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        hidden, width = config.hidden_size, config.word_embed_proj_dim
        linear = partial(Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.embed_tokens = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        positions = config.max_position_embeddings + _POSITION_OFFSET
        self.embed_positions = Embedding(positions, hidden, dtype=dtype, rngs=rngs)
        self.project_in = None if width == hidden else linear(width, hidden)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = (
            LayerNorm(hidden, affine=config.layer_norm_elementwise_affine, dtype=dtype)
            if config.has_final_layer_norm
            else None
        )
        self.project_out = None if width == hidden else linear(hidden, width)
        self.lm_head = None if config.tie_word_embeddings else linear(width, config.vocab_size)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids to the first layer's input."""
        x = self.embed_tokens(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + self.embed_positions(positions + _POSITION_OFFSET)

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The last layer's output to logits."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

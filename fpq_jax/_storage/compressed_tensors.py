"""How compressed-tensors checkpoints store a quantized Linear, in both directions.

Each turns a QTensor into the tensors of its scheme and back, and says of one it cannot hold exactly why.
Their readers, and the arguments in config.json: https://github.com/vllm-project/compressed-tensors.

    fp8     float-quantized         weight F8_E4M3 [out, in], weight_scale F32 [out, 1]: w = weight * scale
    mxfp4   mxfp4-pack-quantized    weight_packed U8 [out, in / 2], weight_scale U8 [out, in / 32]: 2**(scale - 127)
    int4    pack-quantized          weight_packed I32 [out, in / 8], weight_scale F32 [out, in / g], weight_shape
"""

import abc
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fpq_jax._numerics.formats import E2M1, E4M3, INT4
from fpq_jax._numerics.qtensor import QTensor, expand, group_scales
from fpq_jax._numerics.spec import ActivationScale, QuantSpec
from fpq_jax._storage.scheme import Expected, ReadableScheme, Tensors

METHOD = "compressed-tensors"
GROUP = "group_0"  # the name that readers expect
_SCALES = ("F32", "BF16", "F16")
_E8M0_NAN = 255
_MX_GROUP = 32
_INT4_OFFSETS = 0x88  # from two's complement, in both halves of a byte, to levels counted from -8
_INT4_GROUPS = (128, 64, 32)  # those that engines have kernels for


class CompressedScheme(ReadableScheme):
    """One that compressed-tensors knows."""

    FORMAT: ClassVar[str]
    ALIASES: ClassVar[tuple[str, ...]] = ()  # formats of the same layout

    @abc.abstractmethod
    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of the weights and of the activations, in config.json."""

    def stores(self, linear: str, names: Container[str]) -> bool:
        return f"{linear}.weight_scale" in names

    def config(self, ignored: list[str]) -> dict[str, Any]:
        weights, activations = self.arguments()
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
        return {
            "quant_method": METHOD,
            "format": self.FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignored,
            "config_groups": {GROUP: group},
        }


@dataclass(frozen=True)
class Fp8(CompressedScheme):
    """FP8 weights with a scale for each output; with ``activation`` "token" it is what others call FP8_DYNAMIC.

    activation: how activations are quantized to FP8: "token" by token, "static" with one scale, None not at all.
    per_tensor: one scale for all outputs, as some checkpoints have it.
    """

    NAME = "fp8"
    FORMAT = "float-quantized"
    ALIASES = ("naive-quantized",)

    activation: ActivationScale | None = "token"
    per_tensor: bool = False

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        scales = ((1,), (), (1, 1)) if self.per_tensor else ((shape[1], 1), (shape[1],))
        found = {"weight": Expected((shape[::-1],), ("F8_E4M3",)), "weight_scale": Expected(scales, _SCALES)}
        if self.activation == "static":
            found["input_scale"] = Expected(((1,), ()), _SCALES, positive=True)
        return found

    def qtensor(self, linear: str, tensors: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
        spec = QuantSpec(
            format=E4M3,
            group_size="tensor" if self.per_tensor else "channel",
            activation=None if self.activation is None else E4M3,
            activation_scale=self.activation or "token",
        )
        static = tensors["input_scale"].astype(jnp.float32).reshape(1) if self.activation == "static" else None
        scale = tensors["weight_scale"].astype(jnp.float32).reshape(-1, 1)
        return QTensor(tensors["weight"], row_scale=scale, input_scale=static, spec=spec, shape=shape)

    def tensors(self, q: QTensor) -> Tensors:
        wide = expand(q)
        scale = jnp.broadcast_to(wide.row_scale, (q.shape[1], 1))
        found = {"weight": wide.codes, "weight_scale": scale}
        return found if q.input_scale is None else found | {"input_scale": q.input_scale}

    def unsupported_reason(self, q: QTensor) -> str | None:
        fmt = q.spec.format
        if q.group_scale is not None:
            return f"{fmt} codes under a scale of its own for each group"
        if not fmt.expands or (fmt.is_float8 and fmt is not E4M3):
            return f"{fmt} codes"
        if q.spec.activation not in (None, E4M3):
            return f"{q.spec.activation} activations"
        if q.spec.activation_scale == "static" and q.input_scale is None:
            return "static activations without their scale"
        if (own := _activation_of(q)) != self.activation:
            return f"activations quantized by {own or 'nothing'}, where most have {self.activation or 'nothing'}"
        return None

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        kind = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**kind, "strategy": "tensor" if self.per_tensor else "channel", "dynamic": False}
        if self.activation is None:
            return weights, None
        dynamic = self.activation == "token"
        return weights, {**kind, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}


@dataclass(frozen=True)
class Mxfp4(CompressedScheme):
    """E2M1 in groups of 32 under powers of two, activations left alone."""

    NAME = "mxfp4"
    FORMAT = "mxfp4-pack-quantized"
    arithmetic = jnp.bfloat16

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        inputs, outputs = shape
        return {
            "weight_packed": Expected(((outputs, inputs // 2),), ("U8",)),
            "weight_scale": Expected(((outputs, inputs // _MX_GROUP),), ("U8",), _E8M0_NAN),
        }

    def qtensor(self, linear: str, tensors: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
        spec = QuantSpec(format=E2M1, group_size=_MX_GROUP, constraint="m1", activation=None)
        # the bits of a power of two: exponent field, no fraction; 2**-127 is the subnormal 2**22
        field = jnp.asarray(tensors["weight_scale"]).astype(jnp.int32)
        scale = jax.lax.bitcast_convert_type(jnp.where(field == 0, 1 << 22, field << 23), jnp.float32)
        return _grouped(tensors["weight_packed"], scale, spec, shape)

    def tensors(self, q: QTensor) -> Tensors:
        field = jax.lax.bitcast_convert_type(group_scales(q), jnp.int32) >> 23
        return {
            "weight_packed": q.codes,
            "weight_scale": _repeated(field.astype(jnp.uint8), q, _MX_GROUP),
        }

    def unsupported_reason(self, q: QTensor) -> str | None:
        if q.spec.format.name.removesuffix("-qtorch") != E2M1.name:
            return f"{q.spec.format} codes"
        if q.spec.constraint != "m1":
            return f"scales under {q.spec.constraint}" if q.spec.constraint else "free scales"
        return _why_no_groups(q, _MX_GROUP)

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        kind = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        return {**kind, "strategy": "group", "group_size": _MX_GROUP, "scale_dtype": "torch.uint8"}, None


@dataclass(frozen=True)
class Int4(CompressedScheme):
    """Symmetric INT4 in groups, activations left alone (W4A16)."""

    NAME = "int4"
    FORMAT = "pack-quantized"

    group_size: int = 128

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        inputs, outputs = shape
        return {
            "weight_packed": Expected(((outputs, -(-inputs // 8)),), ("I32",)),
            "weight_scale": Expected(((outputs, -(-inputs // self.group_size)),), _SCALES),
            "weight_shape": Expected(((2,),), ("I64", "I32"), values=shape[::-1]),
        }

    def qtensor(self, linear: str, tensors: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
        spec = QuantSpec(format=INT4, group_size=self.group_size, activation=None)
        octets = jax.lax.bitcast_convert_type(jnp.asarray(tensors["weight_packed"]), jnp.uint8)
        codes = octets.reshape(shape[1], -1)[:, : -(-shape[0] // 2)] ^ _INT4_OFFSETS
        return _grouped(codes, tensors["weight_scale"].astype(jnp.float32), spec, shape)

    def tensors(self, q: QTensor) -> Tensors:
        octets = (q.codes ^ _INT4_OFFSETS).reshape(q.shape[1], -1, 4)
        return {
            "weight_packed": jax.lax.bitcast_convert_type(octets, jnp.int32),
            "weight_scale": _repeated(group_scales(q), q, self.group_size),
            "weight_shape": np.asarray(q.shape[::-1], np.int64),
        }

    def unsupported_reason(self, q: QTensor) -> str | None:
        if q.spec.format is not INT4:
            return f"{q.spec.format} codes"
        return _why_no_groups(q, self.group_size)

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        kind = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        return {**kind, "strategy": "group", "group_size": self.group_size}, None


def _grouped(codes: Array, scale: Float[Array, "out groups"], spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    if scale.shape[1] == 1:
        return QTensor(codes, row_scale=scale, spec=spec, shape=shape)
    return QTensor(codes, group_scale=scale, spec=spec, shape=shape)


def _repeated(values: Array, q: QTensor, group: int) -> Array:
    """A value for each group of ``group`` inputs, of values [out or 1, groups] for q's own, which are multiples."""
    inputs, outputs = q.shape
    values = jnp.broadcast_to(values, (outputs, values.shape[1]))
    return jnp.repeat(values, q.spec.group_length(inputs) // group, axis=1)[:, : inputs // group]


def _why_no_groups(q: QTensor, group: int) -> str | None:
    inputs = q.shape[0]
    if inputs % group:
        return f"{inputs} inputs, which groups of {group} do not divide"
    if q.spec.num_groups(inputs) > 1 and q.spec.group_length(inputs) % group:
        return f"groups of {q.spec.group_length(inputs)}, which are no multiple of {group}"
    return None


def _activation_of(q: QTensor) -> ActivationScale | None:
    return None if q.spec.activation is None else q.spec.activation_scale


FORMATS = {scheme.NAME: scheme.FORMAT for scheme in (Fp8, Mxfp4, Int4)}  # as config.json has them


def scheme_for(name: str, weights: Sequence[QTensor]) -> CompressedScheme:
    """The scheme called ``name`` with the arguments that fit most of these weights."""
    if name == Fp8.NAME:
        ways = list(map(_activation_of, weights))
        return Fp8(max(ways, key=ways.count, default="token"))
    if name == Mxfp4.NAME:
        return Mxfp4()
    fits = lambda scheme: sum(scheme.unsupported_reason(q) is None for q in weights)
    return max(map(Int4, _INT4_GROUPS), key=fits)


def can_hold(name: str, weights: Sequence[QTensor]) -> bool:
    """Whether the scheme called ``name`` holds all these weights (their shapes are enough) exactly."""
    scheme = scheme_for(name, weights)
    return all(scheme.unsupported_reason(q) is None for q in weights)

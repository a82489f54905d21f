"""How a quantized weight meets its input: the one place that decides it.

- "fp8", FP8 codes on both sides (one scale a row, M1 or M2; not E5M2 on both): one ``dot_general`` in FP8 over the full
  K with a float32 result. Every dimension is padded with zeros to a multiple of 16, without which a GPU has no FP8
  product. On Hopper XLA asks for the tensor cores' fast accumulation, of fewer digits than float32's, unless
  ``jax.default_matmul_precision("highest")`` is set;
- "int8", integer codes on both sides, one scale a row: one int8 x int8 ``dot_general`` with int32 accumulation;
- "codes", any other pair, one scale a row, M1 or M2: the codes, which bfloat16 holds exactly, multiplied in it with
  float32 accumulation;
- "dequantized", free scales of several groups: the weight, rounded to bfloat16, and the activation's codes in it;
- "weight_only", activations left alone: the dequantized weight in the activation's dtype.

Codes in the order of our own kernel (``Fragments``) are multiplied by it for few tokens, and for many as above
from packed codes.

Scales come behind the product, then LoRC in bfloat16, then the bias. Gradients flow to the input, straight through its
rounding, to LoRC's factors and to the bias, not to codes and scales. Levels less their zero points are exact in
bfloat16 but do not fit int8: with int8 codes c and m that lack a and b, the product is
sum(c m) + a sum(m) + b sum(c) + K a b, all of it in int32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from fpq_jax._matmul.fp4_kernel.fragments import Fragments, of_fragments
from fpq_jax._matmul.products import _product, tokens_for
from fpq_jax._numerics.activations import QuantizedTokens
from fpq_jax._numerics.qtensor import LowRank, QTensor, check_exponents, dequantize, expand
from fpq_jax._support.mesh import MODEL, over_model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParallelKernel:
    """A kernel of FP8 products whose inputs are divided over the "model" axis of ``mesh``.

    Each device multiplies its part of the inputs, LoRC's product with it, and the results are added up in the dtype of
    the input. What is sent is that, and a token's absmax before it, so that all quantize with one scale.
    """

    kernel: QTensor
    mesh: Mesh | AbstractMesh = field(metadata={"static": True})


def linear(
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"] | QTensor | Fragments | RowParallelKernel,
    bias: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies inputs by a kernel, quantized or not: ``x @ kernel + bias``.

    A QTensor is multiplied as its spec says: activations quantized by token, and one FP8 product over all inputs where
    the weight has an FP8 form. Gradients flow to ``x`` (straight through its rounding), to the factors of LoRC and to
    the bias, not to codes and scales.

    Args:
        x: ``[..., in]``, any float type.
        kernel: ``[in, out]``, an array, a QTensor, or what ``expand_params`` makes of one.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        FpqError: an exponent is out of the range in which the weight expands to FP8 exactly.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (4, 64))
        >>> w = jax.random.normal(jax.random.key(1), (64, 32))
        >>> q = fpq.quantize_array(w, fpq.QuantSpec(format="e4m3", group_size="channel"))
        >>> error = jnp.linalg.norm(fpq.linear(x, q) - x @ w) / jnp.linalg.norm(x @ w)
        >>> bool(error < 0.06)
        True
    """
    return linears(x, [(kernel, bias)])[0]


def linears(
    x: Float[Array, "*batch in"],
    weights: Sequence[tuple[Any, Any]],
    *,
    dtype: Any = None,
    shared: dict[Any, tuple[QuantizedTokens, Any]] | None = None,
) -> list[Array]:
    """``linear`` of one input with several (kernel, bias): the input is quantized once for all that take it alike.

    ``dtype`` of what quantized kernels give, by default that of ``x``. ``shared`` keeps the quantized input for
    further calls with the same ``x``.
    """
    if x.ndim == 1:
        return [y[0] for y in linears(x[None], weights, dtype=dtype, shared=shared)]
    shared = {} if shared is None else shared
    results = []
    for kernel, bias in weights:
        if not isinstance(kernel, QTensor | Fragments):
            y = _row_parallel_linear(x, kernel) if isinstance(kernel, RowParallelKernel) else x @ kernel
            results.append(y if bias is None else y + bias)
            continue
        tokens = None
        if kernel.spec.activation is not None:
            # static scales are each kernel's own; what is kept holds the one that its key is of
            how = (kernel.spec.activation, None if kernel.input_scale is None else id(kernel.input_scale))
            if how not in shared:
                shared[how] = _tokens(x, kernel), kernel.input_scale
            tokens = shared[how][0]
            if isinstance(kernel, QTensor) and kernel.has_fp8_form:
                check_exponents(kernel)  # while they can be looked at
        results.append(_quantized_linear(x, tokens, kernel, bias, dtype=dtype))
    return results


def _row_parallel_linear(x: Float[Array, "*batch in"], kernel: RowParallelKernel) -> Float[Array, "*batch out"]:
    # before it is divided: an exponent may be for inputs of two devices
    q = expand(kernel.kernel)
    whole: QTensor = jax.tree.map(lambda _: P(), q)
    low_rank = None if whole.low_rank is None else replace(whole.low_rank, a=P(MODEL))

    def part(x, q):
        q = replace(q, shape=(x.shape[-1], q.shape[1]))
        tokens = tokens_for(jax.lax.stop_gradient(x), q, axis=MODEL)
        return jax.lax.psum(_quantized_linear(x, tokens, q, None, axis=MODEL), MODEL)

    specs = P(*(None,) * (x.ndim - 1), MODEL), replace(whole, codes=P(None, MODEL), low_rank=low_rank)
    return over_model(part, kernel.mesh, specs, P())(x, q)


@partial(jax.jit, inline=True)
def _tokens(x: Float[Array, "*batch in"], q: QTensor | Fragments) -> QuantizedTokens:
    return tokens_for(jax.lax.stop_gradient(x), q)


# jitted so that what many layers do alike is traced once
@partial(jax.jit, static_argnames=("axis", "dtype"), inline=True)
def _quantized_linear(
    x: Float[Array, "*batch in"],
    tokens: QuantizedTokens | None,
    q: QTensor | Fragments,
    bias: Array | None,
    *,
    axis: str | None = None,
    dtype: Any = None,
) -> Float[Array, "*batch out"]:
    """``axis``: the results of the devices along it are to be added up."""
    y = _multiplied(x, tokens, replace(q, low_rank=None))
    if q.low_rank is not None:
        with jax.named_scope("lorc"):
            y = y + _low_rank_linear(x, q.low_rank, axis)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype if dtype is None else dtype)


@jax.custom_jvp
def _multiplied(
    x: Float[Array, "*batch in"], tokens: QuantizedTokens | None, q: QTensor | Fragments
) -> Float[Array, "*batch out"]:
    """x (quantized: ``tokens``) times the weight without LoRC, in float32. It is differentiated as x @ dequantize(q):
    straight through the rounding of x (Bengio et al., arXiv 1308.3432), and the weight is a constant."""
    if tokens is None:
        return jnp.matmul(x, dequantize(of_fragments(q), x.dtype), preferred_element_type=jnp.float32)
    return _product(tokens, q)


def _multiplied_jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    x, _, q = primals
    y = _multiplied(*primals)
    if isinstance(tangents[0], SymbolicZero):
        return y, jnp.zeros_like(y)
    return y, jnp.matmul(tangents[0], dequantize(of_fragments(q), x.dtype), preferred_element_type=jnp.float32)


_multiplied.defjvp(_multiplied_jvp, symbolic_zeros=True)


def _low_rank_linear(
    x: Float[Array, "*batch in"], low_rank: LowRank, axis: str | None = None
) -> Float[Array, "*batch out"]:
    """(x A) B with bfloat16 operands and float32 accumulation; int8 codes are exact in bfloat16, their scale is not.

    The result is bfloat16 where ``x`` is: the correction is small, and XLA then adds it in the epilogue. Divided over
    ``axis``, it is what a device adds to the sum: in bfloat16 of its own part of x A, otherwise an equal share of the
    whole, since x A is rounded and is to be rounded as on one device.
    """
    whole = axis is not None and x.dtype != jnp.bfloat16
    if x.dtype == jnp.bfloat16 and low_rank.scale is None:
        inner = jnp.matmul(x, low_rank.a, preferred_element_type=jnp.bfloat16)
    else:
        inner = _bfloat16_matmul(x, low_rank.a)
        inner = jax.lax.psum(inner, axis) if whole else inner
        inner = inner if low_rank.scale is None else inner * low_rank.scale
    y = _bfloat16_matmul(inner, low_rank.b)
    y = y / jax.lax.axis_size(axis) if whole else y
    return y.astype(jnp.bfloat16) if x.dtype == jnp.bfloat16 else y


def _bfloat16_matmul(x: Float[Array, "*batch k"], w: Shaped[Array, "k n"]) -> Float[Array, "*batch n"]:
    """x @ w of operands rounded to bfloat16, in float32."""
    if x.dtype != jnp.bfloat16:
        # a bare cast there and back is dropped in some programs and kept in others, which would then differ
        x = jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16)
    return jnp.matmul(x, w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

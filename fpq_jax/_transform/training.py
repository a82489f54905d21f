"""Train around quantized parameters: what can be trained, and rounding that gradients pass straight through."""

from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._errors import FpqError
from fpq_jax._matmul.weight_layouts import is_quantized
from fpq_jax._numerics.formats import Format, cast
from fpq_jax._numerics.qtensor import LowRank, dequantize, quantize_array
from fpq_jax._numerics.spec import QuantSpec

Trained = Literal["low_rank", "all"]


def partition(params: Any, train: Trained = "low_rank") -> tuple[Any, Any]:
    """Splits a tree with QTensors into what is trained and the rest.

    Codes and scales are never trained, nor are INT8 factors of LoRC. The factors come in float32, so that small steps
    are not lost; ``combine`` rounds them to bfloat16 again.

    Args:
        params: a tree of arrays and QTensors.
        train: ``"low_rank"`` for the factors of LoRC alone, ``"all"`` for floating-point arrays too.

    Returns:
        What is trained, and the rest; each tree has None where the other one has something.

    Raises:
        FpqError: there is nothing to train, or ``train`` is neither.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.lorc(w, fpq.quantize_array(w, fpq.QuantSpec(group_size=32)), rank=4)
        >>> trained, rest = fpq.partition({"kernel": q, "bias": jnp.zeros(32)})
        >>> jax.tree.map(jnp.shape, jax.tree.leaves(trained))
        [(64, 4), (4, 32)]
        >>> apply = fpq.quantized(lambda params, x: x @ params["kernel"] + params["bias"])
        >>> loss = lambda trained: (apply(fpq.combine(trained, rest), jnp.ones((2, 64))) ** 2).mean()
        >>> jax.grad(loss)(trained)["kernel"].b.shape
        (4, 32)
    """
    if train not in get_args(Trained):
        raise FpqError(f"train is {train!r}; it must be {' or '.join(get_args(Trained))}.")

    def own(leaf: Any) -> Any:
        if is_quantized(leaf):
            if leaf.low_rank is None or leaf.low_rank.scale is not None:
                return None
            return jax.tree.map(lambda a: a.astype(jnp.float32), leaf.low_rank)
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if train == "all" and floating else None

    def rest(leaf: Any) -> Any:
        if own(leaf) is None:
            return leaf
        return replace(leaf, low_rank=None) if is_quantized(leaf) else None

    trained = jax.tree.map(own, params, is_leaf=_is_whole)
    if not jax.tree.leaves(trained):
        raise FpqError(
            'There is nothing to train: no kernel has bfloat16 LoRC factors; use a recipe with lorc or train="all".'
        )
    return trained, jax.tree.map(rest, params, is_leaf=_is_whole)


def combine(trained: Any, rest: Any) -> Any:
    """Joins what ``partition`` split. It is differentiable.

    Args:
        trained: the first of the two trees.
        rest: the second.

    Returns:
        The tree, with LoRC's factors in bfloat16.

    Raises:
        FpqError: the trees are given in the other order.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> q = fpq.lorc(w, fpq.quantize_array(w, fpq.QuantSpec(group_size=32)), rank=4)
        >>> trained, rest = fpq.partition({"kernel": q})
        >>> fpq.combine(trained, rest)["kernel"].low_rank.a.dtype
        dtype(bfloat16)
    """
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(trained, is_leaf=_is_whole)):
        raise FpqError("combine takes what is trained first, and then the rest.")

    def one(trained: Any, rest: Any) -> Any:
        if isinstance(trained, LowRank):
            return replace(rest, low_rank=jax.tree.map(lambda a: a.astype(jnp.bfloat16), trained))
        return rest if trained is None else trained

    return jax.tree.map(one, trained, rest, is_leaf=_is_whole)


def straight_through(x: Float[Array, "..."], how: Format | QuantSpec) -> Float[Array, "..."]:
    """Rounds values with the gradient of no rounding at all, for quantization-aware training.

    That is the straight-through estimator (Bengio et al., 2013, arXiv 1308.3432).

    Args:
        x: ``[...]``, any float type.
        how: a ``Format``, to cast each value as it is; or a ``QuantSpec``, to round a weight ``[..., in, out]`` with
            scales as ``quantize_array`` does.

    Returns:
        ``[...]`` in the dtype of ``x``.

    Raises:
        FpqError: ``how`` is neither, or is a ``QuantSpec`` and ``x`` has fewer than two axes.

    Example:
        >>> x = jnp.array([0.2, 1.1, 5.2])
        >>> fpq.straight_through(x, fpq.E2M1)
        Array([0., 1., 6.], dtype=float32)
        >>> jax.grad(lambda x: fpq.straight_through(x, fpq.E2M1).sum())(x)
        Array([1., 1., 1.], dtype=float32)
    """
    if not isinstance(how, Format | QuantSpec):
        raise FpqError(f"how is {how!r}; it must be a Format such as E4M3, or a QuantSpec.")
    if isinstance(how, QuantSpec) and x.ndim < 2:
        raise FpqError(f"A weight of shape {x.shape} has no inputs and outputs; round it by a Format.")
    rounded = jax.custom_jvp(lambda x: _rounded(x, how))
    rounded.defjvp(lambda primals, tangents: (rounded(primals[0]), tangents[0]))
    return rounded(x)


def _rounded(x: Array, how: Format | QuantSpec) -> Array:
    if isinstance(how, Format):
        return cast(x, how).astype(x.dtype)
    if x.ndim > 2:
        return jax.vmap(lambda w: _rounded(w, how))(x)
    return dequantize(quantize_array(x, how), x.dtype)


def _is_whole(leaf: Any) -> bool:
    return leaf is None or is_quantized(leaf) or isinstance(leaf, LowRank)

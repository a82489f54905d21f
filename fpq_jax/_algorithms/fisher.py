"""How much the model's loss rises with an error in a weight: its Fisher information, as a Kronecker product.

The Hessian X^T X takes all tokens and outputs for equally important, and the errors of a window's tokens for
independent of each other. The loss knows better: attention adds the values of many tokens up, so an error that all of
them share costs far more there than one that averages out. With G the gradient of a window's loss by a weight
[in, out], where the window's labels are drawn from the model itself, an error D raises the loss of the window by

    1/2 E <G, D>^2,

the second-order term of its Kullback-Leibler divergence from the original. As a product of one factor for the inputs
and one for each output, E of G G^T and of the columns' squares (K-FAC of whole sequences, Eschenhagen et al., 2023,
arXiv 2311.00636; for rounding, YAQA, Tseng et al., 2025, arXiv 2505.22988), it is

    1/2 sum_o b_o D_o^T A D_o / tr A,    A = sum over windows of G G^T,  b_o = the mean over windows of |G_o|^2,

of which GPTQ, the scale search and the low rank take A in the place of the Hessian. A is of few windows, so it is taken
together with the Hessian.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._algorithms.linalg import matmul


class Fisher(NamedTuple):
    """Sums over windows for one kernel, of its gradients G [in, out].

    inputs: of G G^T, float32 [in, in]. outputs: of each column's squares, float32 [out]. tokens: how many, int32.
    """

    inputs: Any
    outputs: Any
    tokens: Any


def fisher_of(gradient: Float[Array, "in out"], tokens: int | Array) -> Fisher:
    """Of one window of so many tokens."""
    gradient = gradient.astype(jnp.float32)
    return Fisher(matmul(gradient, gradient.T), jnp.sum(gradient**2, axis=0), jnp.asarray(tokens, jnp.int32))


def blended(hessian: Float[Array, "in in"], fisher: Fisher, share: float) -> Float[Array, "in in"]:
    """A Hessian of which ``share`` is the Fisher information's, at the same trace."""
    trace = jnp.trace(fisher.inputs)
    factor = jnp.where(trace > 0, jnp.trace(hessian) / jnp.where(trace > 0, trace, 1.0), 0.0)
    return jnp.where(trace > 0, share * factor * fisher.inputs + (1 - share) * hessian, hessian)


def expected_losses(error: Float[Array, "in out"], fisher: Fisher) -> Float[Array, " out"]:
    """By how much the error of each output raises the loss of a token, in nats."""
    trace = jnp.trace(fisher.inputs)
    each = jnp.sum(error * matmul(fisher.inputs, error), axis=0)
    scale = jnp.where(trace > 0, trace, 1.0) * jnp.maximum(fisher.tokens, 1)
    return 0.5 * fisher.outputs * each / scale

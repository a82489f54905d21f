"""A Hessian as a metric of errors: damped, in factors, in the order in which the inputs are rounded.

With the upper triangular R of H = R R^T (a Cholesky factorization from the far end) the loss of an error D is
tr(D^T H D) = |R^T D|^2.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Order = Literal["natural", "activation"]

_MAX_DAMPING_STEPS = 8  # each raises the damping tenfold


class GptqStats(NamedTuple):
    """Holds what GPTQ had to do to succeed.

    Attributes:
        damping: float32, the share of the mean of the Hessian's diagonal with which the Cholesky factorization
            succeeded.
        dead: int32, how many inputs were never seen.
    """

    damping: Float[Array, ""]
    dead: Int[Array, ""]


class Metric(NamedTuple):
    """A damped Hessian in factors. hessian: damped. factor: lower triangular, R^T with R R^T = H, rows and columns in
    ``order``. dead: which inputs were never seen; they have a one on the diagonal."""

    hessian: Float[Array, "in in"]
    factor: Float[Array, "in in"]
    order: Int[Array, " in"]
    dead: Bool[Array, " in"]
    damping: Float[Array, ""]

    @property
    def stats(self) -> GptqStats:
        return GptqStats(self.damping, jnp.sum(self.dead))

    @property
    def importance(self) -> Float[Array, " in"]:
        """What an error at each input costs while all later ones make up for it: R_ii^2."""
        return jnp.zeros(len(self.order)).at[self.order].set(jnp.diagonal(self.factor) ** 2)


def factorize(hessian: Float[Array, "in in"], damping: float | Array, order: Order) -> Metric:
    """The Hessian with damping, raised until the Cholesky factorization succeeds, see ``gptq``."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    importance = jnp.diagonal(hessian)
    order_ = jnp.argsort(-importance) if order == "activation" else jnp.arange(len(hessian))
    added = damping * jnp.mean(importance)
    factor, taken = cholesky(hessian[order_][:, order_], added, damping, jnp.ones(len(hessian), bool))
    damped = hessian + jnp.diag(jnp.broadcast_to(added * (taken / damping), (len(hessian),)))
    return Metric(damped, factor, order_, dead, taken)


def cholesky(hessian: Array, added: Array, damping: float | Array, real: Array) -> tuple[Array, Array]:
    """The lower triangular R^T with R R^T = H + damping, and the damping with which this succeeded."""

    def attempt(i):
        share = 10.0**i
        damped = hessian + jnp.diag(jnp.where(real, added * share, 0.0))
        # the Cholesky factor of the reversed matrix, reversed, is upper triangular
        return jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T

    def failed(state):
        i, factor = state
        return ~jnp.all(jnp.isfinite(factor)) & (i < _MAX_DAMPING_STEPS)

    i, factor = jax.lax.while_loop(failed, lambda s: (s[0] + 1, attempt(s[0] + 1.0)), (jnp.float32(0), attempt(0.0)))
    return factor, damping * 10.0**i

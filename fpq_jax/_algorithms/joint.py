"""Scales, codes and low-rank correction of one weight, each found for what the others leave.

The low rank comes first, of the weight itself; then in turn, ``rounds + 1`` times: scales and codes for W - A B, and
A B for W - Q. Each step takes what is best for the loss of the outputs while the other part stays.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._algorithms.coordinate_descent import descend
from fpq_jax._algorithms.gptq import round_in_order
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.lorc import weighted_low_rank
from fpq_jax._algorithms.metric import Metric
from fpq_jax._algorithms.scale_search import search_scales
from fpq_jax._numerics.formats import encode
from fpq_jax._numerics.qtensor import LowRank, QTensor, assemble
from fpq_jax._numerics.scales import Scale, of_inputs, weight_scales

Columns = Callable[[Array], Array]


def quantize_jointly(
    w: Float[Array, "in out"],
    metric: Metric,
    recipe: LinearRecipe,
    *,
    seed: int | Array = 0,
    rank: int | Array | None = None,
    gather: Columns = lambda m: m,
    own: Columns = lambda m: m,
) -> QTensor:
    """A weight, or what it should be, with codes and, where the recipe has it weighted, low rank.

    ``rank``: how much of the recipe's is used, the rest being zeros; None for all of it.
    Where the outputs are divided over devices, ``w`` are a device's own; ``gather`` gives all columns of a matrix that
    is divided so, ``own`` a device's of a whole one.
    """
    spec, lorc = recipe.spec, recipe.lorc if recipe.lorc is not None and recipe.lorc.weighted else None
    w = jnp.where(metric.dead[:, None], 0.0, w.astype(jnp.float32))
    find_scales = search_scales if recipe.scale_search else weight_scales
    importance = metric.importance if recipe.scale_search else jnp.diagonal(metric.hessian)

    def codes(target: Array) -> tuple[Array, Array, tuple[Scale, Scale]]:
        """Values of the format, the weight that they are, and the scales."""
        scales, reference = find_scales(target, importance, spec)
        each = of_inputs(scales, spec, len(w))
        values = round_in_order(target, each, metric, spec.format)
        if recipe.sweeps:
            values = descend(values, target, metric.hessian, each, spec.format, recipe.sweeps)
        return values, each.numbers(values, spec.format), (scales, reference)

    def tensor(values: Array, scales: tuple[Scale, Scale]) -> QTensor:
        of_groups, reference = scales
        return assemble(encode(values, spec.format), of_groups, reference, spec)

    if lorc is None:
        values, _, scales = codes(w)
        return tensor(values, scales)
    assert lorc.rank != "auto", "Recipe.with_lorc_rank comes first"
    most, dtype = lorc.rank, lorc.dtype

    def low_rank(error: Array) -> LowRank:
        found = weighted_low_rank(gather(error), metric, most, dtype, seed, rank)
        return replace(found, b=own(found.b))

    def step(_, state):
        low, *_ = state
        values, rounded, scales = codes(w - low.product())
        return low_rank(w - rounded), values, scales

    first = low_rank(w)
    shapes = jax.eval_shape(lambda: codes(w)[::2])
    empty = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
    low, values, scales = jax.lax.fori_loop(0, lorc.rounds + 1, step, (first, *empty))
    return replace(tensor(values, scales), low_rank=low)

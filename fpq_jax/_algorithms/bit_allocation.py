"""Which weights get more bits, so that the loss is least at an average.

A weight has some candidates, which all run on the same FP8 product: its format in groups of its size or of 32, each
with low-rank corrections of some ranks if there are to be any, and FP8. One calibration pass gives the error of each,
and with the weight's Fisher information what it costs (see ``fisher.py``). The costs of the weights add up, since their
errors are as good as independent of each other.

So what is to be chosen is one candidate for each weight with the least sum of costs at a given sum of bits, the
multiple-choice knapsack problem. At a price for a bit each weight has its own best candidate, of the least cost plus
price; the lowest price that is low enough gives the best choice that there is at its number of bits (Everett, 1963,
Operations Research 11, 399-417). What is left of the bits, less than a step of one weight, goes where it lowers the
cost most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fpq_jax._algorithms.fisher import Fisher
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._algorithms.lorc import lorc
from fpq_jax._algorithms.quantize_linears import quantize_kernel
from fpq_jax._algorithms.statistics import InputStats
from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E4M3
from fpq_jax._numerics.qtensor import quantize_array
from fpq_jax._numerics.spec import GroupSize, QuantSpec
from fpq_jax._support.trees import stored_bytes

RANKS = (0, 8, 32)
_SMALL_GROUP = 32  # 64 and 128 beside it bring nothing: 0.3 % of the loss on SmolLM2-135M
_HALVINGS = 60


def candidates(recipe: LinearRecipe) -> tuple[LinearRecipe, ...]:
    """What a weight of this recipe may become."""
    ranks = (0,) if recipe.lorc is None else RANKS
    # on SmolLM2-135M sweeps take 5 % from FP8's error, which is a fifteenth of NF4's, and the scale search 0.2 %
    wide = replace(recipe, spec=_wide(recipe.spec), lorc=None, scale_search=False, sweeps=0)
    return (*(_with(recipe, group, rank) for group in _group_sizes(recipe.spec) for rank in ranks), wide)


def hardest_candidate(recipe: LinearRecipe) -> LinearRecipe:
    """The one that takes most memory to make."""
    return max(candidates(recipe), key=lambda one: 0 if one.lorc is None else one.lorc.rank)


def expected_losses(
    w: Float[Array, "in out"], seen: InputStats, fisher: Fisher, recipe: LinearRecipe, mesh: Mesh, seed: int
) -> list[float]:
    """What each of a weight's ``candidates`` costs, in nats for each token: it is made, by the program that makes it
    later, too. All arrays are on every device of the mesh."""
    if recipe.error_propagation and seen.cross is None:
        seen = seen._replace(cross=jnp.zeros_like(seen.hessian))  # nothing is in front of it yet
    made = (quantize_kernel([w], seen, one, mesh, seed, fisher).outputs for one in candidates(recipe))
    return [float(np.asarray(outputs.expected).sum(dtype=np.float64)) for outputs in made]


@cache
def stored_bits(shape: tuple[int, int], recipe: LinearRecipe) -> int:
    """All that a weight of this shape takes: codes, scales and low rank."""

    def quantized(w: Array) -> Array:
        q = quantize_array(w, recipe.spec)
        if recipe.lorc is None:
            return q
        assert recipe.lorc.rank != "auto", "Recipe.with_lorc_rank comes first"
        return lorc(w, q, rank=recipe.lorc.rank, dtype=recipe.lorc.dtype)

    return 8 * stored_bytes(jax.eval_shape(quantized, jax.ShapeDtypeStruct(shape, jnp.float32)))


def allocate(losses: Mapping[str, Sequence[float]], bits: Mapping[str, Sequence[int]], most: float) -> dict[str, int]:
    """Which candidate of each weight makes the sum of losses least, with at most so many bits in all.

    FpqError where even the cheapest ones take more.
    """
    cost = {name: np.asarray(of, np.float64) for name, of in losses.items()}
    size = {name: np.asarray(bits[name], np.float64) for name in cost}
    used = lambda chosen: sum(size[name][i] for name, i in chosen.items())
    at_price = lambda price: {name: int(np.argmin(cost[name] + price * size[name])) for name in cost}
    if (least := sum(of.min() for of in size.values())) > most:
        raise FpqError(f"the least that the candidates take is {least:,.0f} bits, and {most:,.0f} are allowed.")
    if used(chosen := at_price(0.0)) <= most:
        return chosen
    low, high = 0.0, max(of.max() for of in cost.values())  # of a bit: none is worth all that a weight costs
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if used(at_price(middle)) <= most else (middle, high)
    chosen = at_price(high)
    while True:
        left = most - used(chosen)
        steps = [
            (cost[name][i] - cost[name][j], name, j)
            for name, i in chosen.items()
            for j in range(len(cost[name]))
            if cost[name][j] < cost[name][i] and size[name][j] - size[name][i] <= left
        ]
        if not steps:
            return chosen
        _, name, j = max(steps)
        chosen[name] = j


def _with(recipe: LinearRecipe, group: GroupSize, rank: int) -> LinearRecipe:
    correction = replace(recipe.lorc, rank=rank) if recipe.lorc is not None and rank else None
    return replace(recipe, spec=replace(recipe.spec, group_size=group), lorc=correction)


def _group_sizes(spec: QuantSpec) -> tuple[GroupSize, ...]:
    own = spec.group_size
    return (own, _SMALL_GROUP) if isinstance(own, int) and own > _SMALL_GROUP else (own,)


def _wide(spec: QuantSpec) -> QuantSpec:
    return replace(spec, format=E4M3, group_size="channel", constraint=None, exponent_rounding="up", compute_rows=1)

"""What each Linear becomes where a recipe's ``bits`` leave it open."""

import glob
from collections.abc import Mapping
from dataclasses import replace

from fpq_jax._algorithms.bit_allocation import allocate, candidates, stored_bits
from fpq_jax._algorithms.recipe import Recipe, Rule
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._errors import FpqError
from fpq_jax._pipeline.quantize_layers import linears
from fpq_jax._support.mesh import from_first


def choose_bits(checkpoint: HfCheckpoint, recipe: Recipe, losses: Mapping[str, list[float]]) -> Recipe:
    """The recipe with a rule for each Linear that becomes something else than the default.

    ``losses``: of the candidates of every open Linear, by its kernel's path.
    """
    bits, allowed, _ = _bits(checkpoint, recipe)
    chosen = from_first(allocate(losses, bits, allowed))
    names, choices = linears(checkpoint), candidates(recipe.default)
    rules = tuple(
        Rule(match=glob.escape(names[path]), change=choices[which])
        for path, which in chosen.items()
        if choices[which] != recipe.default
    )
    return replace(recipe, rules=(*recipe.rules, *rules), bits=None)


def check_bits(checkpoint: HfCheckpoint, recipe: Recipe) -> None:
    """FpqError where no choice takes as few bits as the recipe's ``bits``."""
    bits, allowed, weights = _bits(checkpoint, recipe)
    assert recipe.bits is not None
    if not bits:
        raise FpqError(f"Recipe {recipe.name} has a rule for every Linear, so bits has nothing to choose.")
    if (missing := sum(map(min, bits.values())) - allowed) > 0:
        least = recipe.bits + missing / weights
        raise FpqError(
            f"bits is {recipe.bits:g}, and the least that this recipe can take of this model is {least:.4f}; "
            "say --bits, or another recipe."
        )


def _bits(checkpoint: HfCheckpoint, recipe: Recipe) -> tuple[dict[str, list[int]], float, int]:
    """(what each candidate of every open Linear takes, what they may take together, how many weights are quantized)."""
    assert recipe.bits is not None
    names = linears(checkpoint)
    of_name = recipe.for_linears(names.values())
    choices = candidates(recipe.default)
    bits: dict[str, list[int]] = {}
    allowed, weights = 0.0, 0
    for path, name in names.items():
        what, shape = of_name[name], checkpoint.shapes[path]
        if what is None:
            continue
        weights += shape[0] * shape[1]
        allowed += recipe.bits * shape[0] * shape[1]
        if what is recipe.default:
            bits[path] = [stored_bits(shape, choice) for choice in choices]
        else:
            allowed -= stored_bits(shape, what)
    return bits, allowed, weights

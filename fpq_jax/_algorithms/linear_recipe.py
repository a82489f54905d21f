"""How one Linear is quantized. Frozen, checked when made, read from the keys of a recipe's YAML."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from fpq_jax._algorithms.lorc import FactorDtype
from fpq_jax._algorithms.metric import Order
from fpq_jax._errors import FpqError
from fpq_jax._numerics.spec import LARGEST, QuantSpec

_ROUNDS = 1000  # more of them never end
_ACTIVATION = ("activation", "activation_scale")  # a QuantSpec's fields that stand beside "weight" in YAML
# a LinearRecipe's, as they are
_PLAIN = ("method", "damping", "order", "scale_search", "sweeps", "fisher", "error_propagation")


@dataclass(frozen=True, kw_only=True)
class Lorc:
    """Describes the low-rank compensation of a recipe.

    Attributes:
        rank: of the correction; ``"auto"`` is the paper's for the model's size.
        dtype: what the factors are stored in, ``"bfloat16"`` or ``"int8"``.
        weighted: whether the error of the outputs is what is least, not that of the weights.
        rounds: how often, after the first time, codes and correction are found in turn, each for what the other one
            leaves; for a weighted correction.
    """

    rank: int | Literal["auto"] = 8
    dtype: FactorDtype = "bfloat16"
    weighted: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.rank, int) and not isinstance(self.rank, bool) and 0 < self.rank <= LARGEST
        if self.rank != "auto" and not number:
            raise FpqError(f"lorc: rank is {self.rank!r}; it must be a positive number or auto.")
        if self.dtype not in get_args(FactorDtype):
            raise FpqError(f"lorc: dtype is {self.dtype!r}; it must be one of {', '.join(get_args(FactorDtype))}.")
        if not isinstance(self.weighted, bool):
            raise FpqError(f"lorc: weighted is {self.weighted!r}; it must be true or false.")
        _check_count("lorc: rounds", self.rounds)
        if self.rounds and not self.weighted:
            raise FpqError("lorc: rounds are for a weighted correction; say weighted: true.")


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """Describes how one Linear is quantized.

    Attributes:
        spec: format, groups, scale constraint and activations.
        method: ``"gptq"``, or ``"round"`` to nearest.
        damping: GPTQ's, as a share of the mean of the Hessian's diagonal.
        order: in which GPTQ rounds the inputs, ``"natural"`` or ``"activation"``, see ``gptq``.
        scale_search: whether scales are those of least weighted error, instead of the least that clip nothing.
        sweeps: of coordinate descent over the codes after GPTQ.
        fisher: share, 0 to 1, of the loss's Fisher information in the Hessian, see ``fisher.py``.
        error_propagation: share, 0 to 1, of the error handed on by what is quantized before it that the weight is
            changed to make up for; needs a recipe that is ``sequential``.
        lorc: the low-rank compensation, or None.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    method: Literal["gptq", "round"] = "gptq"
    damping: float = 0.01
    order: Order = "natural"
    scale_search: bool = False
    sweeps: int = 0
    fisher: float = 0.0
    error_propagation: float = 0.0
    lorc: Lorc | None = None

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "round"):
            raise FpqError(f"method is {self.method!r}; it must be gptq or round.")
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 < self.damping < 1:
            raise FpqError(f"damping is {self.damping!r}; it must be a number between 0 and 1.")
        if self.order not in get_args(Order):
            raise FpqError(f"order is {self.order!r}; it must be natural or activation.")
        if not isinstance(self.scale_search, bool):
            raise FpqError(f"scale_search is {self.scale_search!r}; it must be true or false.")
        _check_count("sweeps", self.sweeps)
        for name in ("fisher", "error_propagation"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise FpqError(f"{name} is {share!r}; it must be a number from 0 to 1.")
        if self.static_groups and self.method != "gptq":
            raise FpqError(
                "order, scale_search, sweeps, fisher, error_propagation and a weighted lorc are for method gptq."
            )
        if self.scale_search and self.spec.exponent_rounding != "up":
            raise FpqError(
                f"scale_search finds the exponents; exponent_rounding {self.spec.exponent_rounding} does too."
            )
        if self.error_propagation and self.lorc is not None and not self.lorc.weighted:
            raise FpqError("lorc without weighted: true would undo error_propagation.")

    @property
    def static_groups(self) -> bool:
        """Whether scales are known before the first input is rounded, as everything beyond plain GPTQ needs it."""
        options = self.scale_search, self.sweeps, self.fisher, self.error_propagation, self.corrects_jointly
        return self.order != "natural" or any(options)

    @property
    def corrects_jointly(self) -> bool:
        """Whether the low-rank correction is found with the codes, not after them."""
        return self.lorc is not None and self.lorc.weighted


def linear_recipe(base: LinearRecipe, options: dict[str, Any]) -> LinearRecipe:
    """``base`` with the YAML's keys applied."""
    _check_keys(options, ("weight", *_ACTIVATION, *_PLAIN, "lorc"), "")
    weight = options.pop("weight", None)
    weight = mapping({} if weight is None else weight, "weight")
    _check_keys(weight, tuple(f.name for f in dataclasses.fields(QuantSpec) if f.name not in _ACTIVATION), "weight: ")
    weight |= {key: options.pop(key) for key in _ACTIVATION if key in options}
    if "lorc" in options and options["lorc"] is not None:
        lorc = mapping(options["lorc"], "lorc")
        _check_keys(lorc, tuple(f.name for f in dataclasses.fields(Lorc)), "lorc: ")
        options["lorc"] = Lorc(**lorc)
    return replace(base, spec=replace(base.spec, **weight), **options)


def plain(recipe: LinearRecipe) -> dict[str, Any]:
    """The YAML's keys of it, defaults included."""
    weight = recipe.spec.to_dict()
    return {
        **{key: weight.pop(key) for key in _ACTIVATION},
        "weight": weight,
        **{key: getattr(recipe, key) for key in _PLAIN},
        "lorc": recipe.lorc and dataclasses.asdict(recipe.lorc),
    }


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _ROUNDS:
        raise FpqError(f"{what} is {value!r}; it must be a whole number from 0 to {_ROUNDS}.")


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A copy of plain data that is a mapping; FpqError says what is not."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FpqError(f"{what} must be a mapping of names to values.")
    return dict(value)


def _check_keys(options: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in options:
        if key not in allowed:
            raise FpqError(f"{where}unknown key {key!r}{near(key, allowed)}; the keys are {', '.join(allowed)}.")


def near(word: str, words: Iterable[str]) -> str:
    """For a message: the words that are like a word."""
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""

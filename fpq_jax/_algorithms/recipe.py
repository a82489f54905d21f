"""Recipes: what to do to which Linear. Frozen, checked when made, read from the YAML files in configs/."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fpq_jax._algorithms.lorc import FactorDtype
from fpq_jax._algorithms.metric import Order
from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import Kind
from fpq_jax._numerics.spec import QuantSpec

DEFAULT_RECIPE = "w4a8-fp-m2-lorc"
_ACTIVATION = ("activation", "activation_scale")  # a QuantSpec's fields that stand beside "weight" in YAML
_PLAIN = (
    "method",
    "damping",
    "order",
    "scale_search",
    "sweeps",
    "fisher",
    "error_propagation",
)  # a LinearRecipe's, as they are


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
        number = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0
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


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Describes what is different for the parameters whose name fits a pattern.

    Attributes:
        match: a shell pattern of Hugging Face names, or of paths in a tree that is not one of this library's models.
        change: how they are quantized, None to leave them as they are.
        axes: in such a tree, what each axis of the parameters that fit is: ``"in"``, ``"out"`` or ``"stack"``.
    """

    match: str
    change: LinearRecipe | None
    axes: tuple[Kind, ...] | None = None

    def __post_init__(self) -> None:
        if self.axes is not None and not (
            {"in", "out"} <= set(self.axes) <= set(get_args(Kind)) and self.change is not None
        ):
            raise FpqError(
                f"rule {self.match!r}: axes are {' '.join(self.axes)!r}; each must be in, out or stack, with at least "
                "one in and one out, of what is quantized."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Describes how a model is quantized: a default for every Linear, and rules that change it for some.

    It is frozen and checked when it is made. A later rule wins. The keys of its YAML, and of ``from_dict``, are:

    - ``weight``: a mapping of ``format``, ``group_size``, ``constraint``, ``exponent_rounding`` and ``compute_rows``,
      see ``QuantSpec``.
    - ``activation``, ``activation_scale``: see ``QuantSpec``.
    - ``method``: ``gptq`` or ``round``. ``damping``, ``order``: of GPTQ, see ``gptq``.
    - ``scale_search``: whether scales are those of least weighted error, instead of the least that clip nothing.
    - ``sweeps``: of coordinate descent over the codes after GPTQ.
    - ``lorc``: a mapping of ``rank`` (``auto`` is the paper's for the model's size), ``dtype``, ``weighted`` (the error
      of the outputs is what is least, not that of the weights) and ``rounds`` (how often, after the first time, codes
      and correction are found in turn).
    - ``fisher``: the share, 0 to 1, of the loss's Fisher information in the Hessian that all of these go by.
    - ``sequential``: see below. ``error_propagation``: the share, 0 to 1, of the error handed on by what is quantized
      before it that each weight makes up for; it needs ``sequential``.
    - ``rules``: a list of mappings of ``match``, a shell pattern of names, and either ``quantize: false`` or any of the
      former keys but ``sequential``, with ``axes`` such as ``in out`` for parameters of other trees.

    Attributes:
        name: what messages and reports call it.
        default: how a Linear is quantized where no rule fits it.
        rules: what is different for the parameters that fit a pattern, in order.
        sequential: whether each stage of a layer is calibrated behind the quantized stages before it, as layers are.

    Raises:
        FpqError: a field has an impossible value, or two contradict each other.

    Example:
        >>> recipe = fpq.Recipe.load("w4a8-fp-m2-lorc").with_group_size(128).with_rule("*.head.*", quantize=False)
        >>> recipe.default.spec.format, recipe.default.spec.group_size, recipe.default.lorc.rank
        (e2m1, 128, 'auto')
        >>> recipe.for_linears(["model.head.kernel", "model.up.kernel"])["model.head.kernel"] is None
        True
    """

    name: str = "recipe"
    default: LinearRecipe = field(default_factory=LinearRecipe)
    rules: tuple[Rule, ...] = ()
    sequential: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sequential, bool):
            raise FpqError(f"sequential is {self.sequential!r}; it must be true or false.")
        if not self.sequential and self.propagates:
            raise FpqError("error_propagation needs sequential: true; without it weights get worse.")

    @property
    def propagates(self) -> bool:
        """Whether any weight makes up for errors of others."""
        return any(one.error_propagation > 0 for one in self._every())

    @property
    def needs_fisher(self) -> bool:
        """Whether the Fisher information of the loss is taken for any weight."""
        return any(one.fisher > 0 for one in self._every())

    def _every(self) -> list[LinearRecipe]:
        return [self.default, *(rule.change for rule in self.rules if rule.change is not None)]

    @classmethod
    def load(cls, name: str | Path) -> "Recipe":
        """Loads a recipe by its name, or from a YAML file.

        Args:
            name: a name in configs/, for instance ``"w4a8-fp-m2-lorc"``, or the path of a YAML file.

        Returns:
            The recipe.

        Raises:
            FpqError: there is no such recipe, or the file is not a valid one.

        Example:
            >>> fpq.Recipe.load("w8a8-fp").default.spec.format
            e4m3
        """
        path = Path(name)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            if not path.is_file():
                raise FpqError(f"There is no recipe file {path}.")
            text, name = path.read_text(encoding="utf-8"), path.stem
        elif str(name) in recipe_names():
            text = (resources.files("fpq_jax.configs") / f"{name}.yaml").read_text(encoding="utf-8")
        else:
            raise FpqError(
                f"There is no recipe {str(name)!r}{_near(str(name), recipe_names())}; "
                f"the recipes are {', '.join(recipe_names())}, or name a YAML file."
            )
        try:
            loaded = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FpqError(f"Recipe {name} is not valid YAML: {' '.join(str(error).split())}.") from error
        try:
            return cls.from_dict({"name": str(name), **({} if loaded is None else _mapping(loaded, "the file"))})
        except FpqError as error:
            raise FpqError(f"Recipe {name}: {error}") from error

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Recipe":
        """Makes a recipe of plain data, with the keys of the YAML files; the inverse of ``to_dict``.

        Args:
            options: the keys; what is not given is the default.

        Returns:
            The recipe.

        Raises:
            FpqError: a key is unknown, or a value is impossible.

        Example:
            >>> recipe = fpq.Recipe.from_dict({"weight": {"format": "int4", "group_size": 128}, "method": "round"})
            >>> recipe.default.spec.format, recipe.default.method
            (int4, 'round')
        """
        options = dict(options)
        name, rules = options.pop("name", "recipe"), options.pop("rules", None) or []
        sequential = options.pop("sequential", False)
        default = _linear_recipe(LinearRecipe(), options)
        if not isinstance(rules, list):
            raise FpqError("rules must be a list.")
        return cls(
            name=name,
            default=default,
            rules=tuple(_rule(_mapping(r, "a rule"), default) for r in rules),
            sequential=sequential,
        )

    def to_dict(self) -> dict[str, Any]:
        """Converts the recipe to plain data: everything that defines it, defaults included.

        Returns:
            A dict that ``from_dict`` reads.

        Example:
            >>> recipe = fpq.Recipe.load("w4a8-fp-m2-lorc")
            >>> fpq.Recipe.from_dict(recipe.to_dict()) == recipe
            True
        """
        rules = [
            {
                "match": r.match,
                **({"quantize": False} if r.change is None else _plain(r.change)),
                **({} if r.axes is None else {"axes": " ".join(r.axes)}),
            }
            for r in self.rules
        ]
        return {"name": self.name, **_plain(self.default), "sequential": self.sequential, "rules": rules}

    def with_rule(self, match: str, **options: Any) -> "Recipe":
        """Adds a rule after the others.

        Args:
            match: a shell pattern of names or paths.
            **options: of the rule, as in the YAML files.

        Returns:
            The changed recipe.

        Raises:
            FpqError: a key is unknown, or a value is impossible.

        Example:
            >>> recipe = fpq.Recipe().with_rule("*.down.*", weight={"format": "e4m3", "group_size": "channel"})
            >>> recipe.rules[0].change.spec.format
            e4m3
        """
        return replace(self, rules=(*self.rules, _rule({"match": match, **options}, self.default)))

    def with_group_size(self, group_size: int) -> "Recipe":
        """Changes the group size of all weights, those of rules included.

        Args:
            group_size: how many weights along the input share a scale.

        Returns:
            The changed recipe.
        """
        return self._map(lambda r: replace(r, spec=replace(r.spec, group_size=group_size)))

    def with_lorc_rank(self, rank: int) -> "Recipe":
        """Changes the rank of LoRC where it is ``"auto"``.

        Args:
            rank: the rank to use there.

        Returns:
            The changed recipe.
        """

        def change(r: LinearRecipe) -> LinearRecipe:
            return replace(r, lorc=replace(r.lorc, rank=rank)) if r.lorc is not None and r.lorc.rank == "auto" else r

        return self._map(change)

    def _map(self, change: Callable[[LinearRecipe], LinearRecipe]) -> "Recipe":
        rules = tuple(replace(rule, change=rule.change and change(rule.change)) for rule in self.rules)
        return replace(self, default=change(self.default), rules=rules)

    def for_linears(self, names: Iterable[str]) -> dict[str, LinearRecipe | None]:
        """Decides how each Linear is quantized.

        Args:
            names: the names of all Linears.

        Returns:
            How each is quantized, None to leave it as it is.

        Raises:
            FpqError: a rule fits none of the names or says axes, or every Linear is left as it is.
        """
        names = list(names)
        chosen: dict[str, LinearRecipe | None] = dict.fromkeys(names, self.default)
        for rule in self.rules:
            fitting = self.fitting(rule, names, "Linear")
            if rule.axes is not None:
                raise FpqError(
                    f"Recipe {self.name}: {rule.match!r} says axes, which are for other trees; a Linear's are known."
                )
            chosen.update(dict.fromkeys(fitting, rule.change))
        if not any(chosen.values()):
            raise FpqError(f"Recipe {self.name} leaves every Linear as it is.")
        return chosen

    def fitting(self, rule: Rule, names: list[str], what: str) -> list[str]:
        """Finds the names that a rule fits.

        Args:
            rule: the rule.
            names: the names of all parameters.
            what: what the names are of, for the message.

        Returns:
            The names that fit, at least one.

        Raises:
            FpqError: no name fits.
        """
        fitting = fnmatch.filter(names, rule.match)
        if not fitting:
            raise FpqError(f"Recipe {self.name}: no {what} fits {rule.match!r}{_near(rule.match, names)}.")
        return fitting

    def about(self, names: list[str]) -> "Recipe":
        """Drops the rules that fit none of the names.

        Args:
            names: the names of some parameters.

        Returns:
            The changed recipe.
        """
        return replace(self, rules=tuple(rule for rule in self.rules if fnmatch.filter(names, rule.match)))


def recipe_names() -> list[str]:
    """The recipes in configs/."""
    files = resources.files("fpq_jax.configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def _rule(options: dict[str, Any], default: LinearRecipe) -> Rule:
    match, wanted = options.pop("match", None), options.pop("quantize", True)
    axes = options.pop("axes", None)
    if not isinstance(match, str):
        raise FpqError("a rule needs match, a pattern of Linear names such as '*.down_proj'.")
    if axes is not None and not isinstance(axes, str):
        raise FpqError(f"rule {match!r}: axes must be words such as 'in out'.")
    if wanted is False:
        if options or axes:
            raise FpqError(f"rule {match!r} says quantize: false, so {', '.join(options) or 'axes'} has no meaning.")
        return Rule(match=match, change=None)
    kinds: Any = None if axes is None else tuple(axes.split())
    return Rule(match=match, change=_linear_recipe(default, options), axes=kinds)


def _linear_recipe(base: LinearRecipe, options: dict[str, Any]) -> LinearRecipe:
    """``base`` with the YAML's keys applied."""
    _check_keys(options, ("weight", *_ACTIVATION, *_PLAIN, "lorc"), "")
    weight = _mapping(options.pop("weight", None) or {}, "weight")
    _check_keys(weight, tuple(f.name for f in dataclasses.fields(QuantSpec) if f.name not in _ACTIVATION), "weight: ")
    weight |= {key: options.pop(key) for key in _ACTIVATION if key in options}
    if "lorc" in options and options["lorc"] is not None:
        lorc = _mapping(options["lorc"], "lorc")
        _check_keys(lorc, tuple(f.name for f in dataclasses.fields(Lorc)), "lorc: ")
        options["lorc"] = Lorc(**lorc)
    return replace(base, spec=replace(base.spec, **weight), **options)


def _plain(recipe: LinearRecipe) -> dict[str, Any]:
    weight = recipe.spec.to_dict()
    return {
        **{key: weight.pop(key) for key in _ACTIVATION},
        "weight": weight,
        **{key: getattr(recipe, key) for key in _PLAIN},
        "lorc": recipe.lorc and dataclasses.asdict(recipe.lorc),
    }


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FpqError(f"{what} is {value!r}; it must be a number, 0 or more.")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FpqError(f"{what} must be a mapping of names to values.")
    return dict(value)


def _check_keys(options: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in options:
        if key not in allowed:
            raise FpqError(f"{where}unknown key {key!r}{_near(key, allowed)}; the keys are {', '.join(allowed)}.")


def _near(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""

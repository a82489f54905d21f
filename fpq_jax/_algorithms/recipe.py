"""Recipes: what to do to which Linear. Frozen, checked when made, read from the YAML files in configs/."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from fpq_jax._algorithms.linear_recipe import LinearRecipe, linear_recipe, mapping, near, plain
from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E4M3, Format, get_format
from fpq_jax._numerics.qtensor import Kind

DEFAULT_RECIPE = "w4a8-mixed"
_WIDEST = 32  # bits of a weight that nobody quantized
_CHARACTERS = 2**20  # of a recipe's file
_OF_ALL = ("sequential", "bits", "embedding", "head")  # keys of the whole recipe


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
    - ``bits``: how many bits the weights are to take on average, all that is stored counted. Each Linear that no rule
      fits then becomes what the loss is least with at that average: the 4-bit format of ``weight`` in groups of its
      size or of 32, with ``lorc``, if there is one, of some rank or none, or FP8.
    - ``embedding``, ``head``: ``e4m3`` to have the table of token vectors, or the last kernel, in FP8 with a power of
      two as each token's scale; both or none where they are one. The head meets activations as the default has them.
    - ``rules``: a list of mappings of ``match``, a shell pattern of names, and either ``quantize: false`` or any of the
      former keys that are not of the whole recipe (``sequential``, ``bits``, ``embedding``, ``head``), with ``axes``
      such as ``in out`` for parameters of other trees.

    Attributes:
        name: what messages and reports call it.
        default: how a Linear is quantized where no rule fits it.
        rules: what is different for the parameters that fit a pattern, in order.
        sequential: whether each stage of a layer is calibrated behind the quantized stages before it, as layers are.
        bits: of a weight on average, see above; None for what the default and the rules say.
        embedding: format of the table of token vectors, None to leave it as it is.
        head: format of the last kernel, None to leave it as it is.

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
    bits: float | None = None
    embedding: Format | None = None
    head: Format | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise FpqError(f"name is {self.name!r}; it must be a word.")
        if not isinstance(self.sequential, bool):
            raise FpqError(f"sequential is {self.sequential!r}; it must be true or false.")
        if not self.sequential and self.propagates:
            raise FpqError("error_propagation needs sequential: true; without it weights get worse.")
        if self.bits is not None:
            self._check_bits()
        for name in ("embedding", "head"):
            if (fmt := getattr(self, name)) is not None:
                object.__setattr__(self, name, fmt := get_format(fmt))
                if fmt is not E4M3:
                    raise FpqError(f"{name} is {fmt}; it must be e4m3, or nothing.")

    def _check_bits(self) -> None:
        spec, lorc = self.default.spec, self.default.lorc
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float) or not 0 < self.bits <= _WIDEST:
            raise FpqError(f"bits is {self.bits!r}; it must be a number such as 4.5.")
        if not spec.format.packed:
            raise FpqError(f"bits chooses between a 4-bit format and FP8; {spec.format} is 8 bits wide already.")
        if spec.activation is not None and not spec.activation.is_float8:
            raise FpqError(f"bits may choose FP8 weights, which do not go with {spec.activation} activations.")
        if self.default.method != "gptq":
            raise FpqError("bits is for method gptq, which measures what each choice costs.")
        if lorc is not None and not lorc.weighted:
            raise FpqError("bits is for a weighted lorc; say weighted: true.")

    @property
    def propagates(self) -> bool:
        """Whether any weight makes up for errors of others."""
        return any(one.error_propagation > 0 for one in self._every())

    @property
    def needs_fisher(self) -> bool:
        """Whether the Fisher information of the loss is taken for any weight."""
        return self.bits is not None or any(one.fisher > 0 for one in self._every())

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
            text, name = _text_of(path), path.stem
        elif str(name) in recipe_names():
            text = (resources.files("fpq_jax.configs") / f"{name}.yaml").read_text(encoding="utf-8")
        else:
            raise FpqError(
                f"There is no recipe {str(name)!r}{near(str(name), recipe_names())}; "
                f"the recipes are {', '.join(recipe_names())}, or name a YAML file."
            )
        try:
            loaded = yaml.load(text, _PlainLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
            raise FpqError(f"Recipe {name} is not valid YAML: {' '.join(str(error).split())[:300]}.") from error
        except RecursionError as error:
            raise FpqError(f"Recipe {name} is nested too deeply to be read.") from error
        try:
            return cls.from_dict({"name": str(name), **({} if loaded is None else mapping(loaded, "the file"))})
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
        options = mapping(options, "a recipe")
        name, rules = options.pop("name", "recipe"), options.pop("rules", None)
        of_all = {key: options.pop(key) for key in _OF_ALL if key in options}
        default = linear_recipe(LinearRecipe(), options)
        rules = [] if rules is None else rules
        if not isinstance(rules, list):
            raise FpqError("rules must be a list.")
        return cls(
            name=name,
            default=default,
            rules=tuple(_rule(mapping(r, "a rule"), default) for r in rules),
            **of_all,
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
                **({"quantize": False} if r.change is None else plain(r.change)),
                **({} if r.axes is None else {"axes": " ".join(r.axes)}),
            }
            for r in self.rules
        ]
        return {
            "name": self.name,
            **plain(self.default),
            "sequential": self.sequential,
            "bits": self.bits,
            "embedding": self.embedding and self.embedding.name,
            "head": self.head and self.head.name,
            "rules": rules,
        }

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

    def with_bits(self, bits: float) -> "Recipe":
        """Changes how many bits the weights take on average.

        Args:
            bits: of a weight, all that is stored counted.

        Returns:
            The changed recipe.

        Raises:
            FpqError: the recipe does not go with ``bits``.
        """
        return replace(self, bits=bits)

    @property
    def head_activation(self) -> Format | None:
        """What the activations of a quantized head are rounded to, as those of the default are if that is FP8."""
        activation = self.default.spec.activation
        return activation if activation is not None and activation.is_float8 else None

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
            raise FpqError(f"Recipe {self.name}: no {what} fits {rule.match!r}{near(rule.match, names)}.")
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


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a short text can make more than a memory holds, or what holds itself."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, as *name; write out what they stand for")
        return super().compose_node(parent, index)


def _text_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise FpqError(f"Recipe {path} cannot be read as UTF-8 text: {error}.") from error
    if len(text) > _CHARACTERS:
        raise FpqError(f"{path} is too long for a recipe.")
    return text


def _rule(options: dict[str, Any], default: LinearRecipe) -> Rule:
    match, wanted = options.pop("match", None), options.pop("quantize", True)
    axes = options.pop("axes", None)
    if not isinstance(match, str):
        raise FpqError("a rule needs match, a pattern of Linear names such as '*.down_proj'.")
    if not isinstance(wanted, bool):
        raise FpqError(f"rule {match!r}: quantize is {wanted!r}; it must be true or false.")
    if axes is not None and not isinstance(axes, str):
        raise FpqError(f"rule {match!r}: axes must be words such as 'in out'.")
    if not wanted:
        if options or axes:
            raise FpqError(f"rule {match!r} says quantize: false, so {', '.join(options) or 'axes'} has no meaning.")
        return Rule(match=match, change=None)
    kinds: Any = None if axes is None else tuple(axes.split())
    return Rule(match=match, change=linear_recipe(default, options), axes=kinds)

import itertools

import pytest

from fpq_jax import FpqError, Recipe
from fpq_jax._algorithms.linear_recipe import LinearRecipe, Lorc
from fpq_jax._algorithms.recipe import DEFAULT_RECIPE, recipe_names

NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def test_every_shipped_recipe_loads_and_round_trips_through_plain_data():
    assert DEFAULT_RECIPE in recipe_names()
    recipes = [Recipe.load(name) for name in recipe_names()]
    for recipe in recipes:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert len({str({**r.to_dict(), "name": ""}) for r in recipes}) == len(recipes)


def test_the_names_mean_what_they_say():
    m2 = Recipe.load("w4a8-fp-m2-lorc").default
    assert (m2.spec.format.name, m2.spec.constraint, m2.spec.group_size, m2.lorc) == (
        "e2m1",
        "m2",
        256,
        Lorc(rank="auto"),
    )
    assert m2.spec.activation.name == "e4m3" and m2.method == "gptq" and m2.spec.exponent_rounding == "up"
    assert Recipe.load("w4a8-fp-m1").default.spec.constraint == "m1"
    assert Recipe.load("w4a16-fp").default.spec.activation is None
    assert Recipe.load("w4a8-e3m0").default.spec.format.name == "e3m0"
    w8 = Recipe.load("w8a8-fp").default.spec
    assert (w8.format.name, w8.group_size) == ("e4m3", "channel")
    for name, formats in {
        "w8a8-int": ("int8-asym", "int8-asym"),
        "w8a8-int-fp": ("int8-asym", "e4m3"),
        "w4a8-int": ("int4-asym", "int8-asym"),
        "w4a8-int-fp": ("int4-asym", "e4m3"),
    }.items():
        spec = Recipe.load(name).default.spec
        assert (spec.format.name, spec.activation.name) == formats


def test_lorc_rank_auto_becomes_the_models():
    recipe = Recipe.from_dict({"lorc": {"rank": "auto"}, "rules": [{"match": "*.up_proj", "lorc": {"rank": 3}},
                                                                   {"match": "*.q_proj", "damping": 0.1}]})  # fmt: skip
    chosen = recipe.with_lorc_rank(56).for_linears(NAMES)
    ranks = {name.split(".")[-1]: r.lorc.rank for name, r in chosen.items()}
    assert ranks == {"q_proj": 56, "up_proj": 3, "down_proj": 56}
    assert Recipe.load("w4a8-fp").with_lorc_rank(8) == Recipe.load("w4a8-fp")


def test_rules_change_skip_and_win_in_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "weight: {constraint: m2}\n"
        "rules:\n"
        "  - {match: '*.down_proj', weight: {format: e4m3, constraint: null, group_size: channel}, lorc: {rank: 4}}\n"
        "  - {match: 'model.layers.1.*', quantize: false}\n"
    )
    recipe = Recipe.load(path)
    assert recipe.name == "mine" and Recipe.from_dict(recipe.to_dict()) == recipe
    chosen = recipe.for_linears(NAMES)
    assert chosen["model.layers.0.mlp.up_proj"] == recipe.default
    assert chosen["model.layers.0.mlp.down_proj"].spec.format.name == "e4m3"
    assert chosen["model.layers.0.mlp.down_proj"].lorc == Lorc(rank=4)
    assert [chosen[name] for name in NAMES[3:]] == [None] * 3
    wider = recipe.with_group_size(64).for_linears(NAMES)
    assert {r.spec.group_size for r in wider.values() if r} == {64}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weigth: {}", "unknown key 'weigth' .did you mean weight"),
        ("weight: {grup_size: 3}", "unknown key 'grup_size' .did you mean group_size"),
        ("lorc: {rnk: 3}", "unknown key 'rnk' .did you mean rank"),
        ("lorc: {rank: 0}", "rank is 0"),
        ("lorc: {dtype: fp3}", "dtype is 'fp3'"),
        ("weight: {group_size: 0}", "group_size is 0"),
        ("weight: 3", "weight must be a mapping"),
        ("method: awq", "method is 'awq'"),
        ("damping: 0", "damping is 0"),
        ("damping: lots", "damping is 'lots'"),
        ("rules: 3", "rules must be a list"),
        ("rules: [{weight: {}}]", "needs match"),
        ("rules: [{match: a, quantize: false, lorc: null}]", "no meaning"),
        ("rules: [{match: a, quantize: 'false'}]", "quantize is 'false'; it must be true or false"),
        ("name: 3", "name is 3"),
        ("bits: .nan", "bits is nan"),
        ("a: [", "not valid YAML"),
        ("name: &a [*a]", "not valid YAML: it has aliases"),
        ("weight: {format: &a [x, x], constraint: *a}", "not valid YAML: it has aliases"),
        ("[" * 20_000, "(nested too deeply|not valid YAML)"),
        ("damping: 9999-99-99", "not valid YAML"),
        ("3: x", "must be a mapping of names"),
        ("#" * 2**21, "is too long for a recipe"),
        ("- 1", "must be a mapping"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FpqError, match=f"(Recipe |/)bad.*{said}"):
        Recipe.load(path)


WRONG = [None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", b"x", [], ["a"], {}, {"a": 1}, {1: 2}]
KEYS = {
    "": ("name", "activation", "activation_scale", "method", "damping", "order", "scale_search", "sweeps", "fisher",
         "error_propagation", "lorc", "sequential", "bits", "embedding", "head", "rules", "weight", "other", 3),
    "weight": ("format", "group_size", "constraint", "exponent_rounding", "compute_rows", "other"),
    "lorc": ("rank", "dtype", "weighted", "rounds", "other"),
    "rules": ("match", "quantize", "axes", "weight", "method", "other"),
}  # fmt: skip


@pytest.mark.parametrize("where", KEYS)
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(where):
    """What is taken is kept whole: plain data makes the same recipe again."""
    for key, value in itertools.product(KEYS[where], WRONG):
        options = {key: value}
        options = {"rules": [{"match": "*"} | options]} if where == "rules" else {where: options} if where else options
        try:
            recipe = Recipe.from_dict(options)
        except FpqError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            continue
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_embedding_and_a_head_are_kept_with_the_recipe():
    recipe = Recipe.from_dict({"embedding": "e4m3", "head": "e4m3"})
    assert (
        recipe.to_dict()["embedding"] == "e4m3" and Recipe.from_dict(recipe.to_dict()).head == recipe.head is not None
    )


def test_unknown_recipes_and_rules_without_a_linear_name_the_near_misses():
    with pytest.raises(FpqError, match=r"'w4a8-pf'.*did you mean w4a8-fp"):
        Recipe.load("w4a8-pf")
    with pytest.raises(FpqError, match=r"no recipe file .*absent\.yaml"):
        Recipe.load("absent.yaml")
    recipe = Recipe.from_dict({"rules": [{"match": "model.layers.0.mlp.downproj", "quantize": False}]})
    with pytest.raises(FpqError, match=r"did you mean .*mlp\.down_proj"):
        recipe.for_linears(NAMES)
    with pytest.raises(FpqError, match="leaves every Linear"):
        Recipe.from_dict({"rules": [{"match": "*", "quantize": False}]}).for_linears(NAMES)
    assert LinearRecipe() == Recipe.load("w4a8-fp").default

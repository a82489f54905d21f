"""What the default recipe is made of, on the demo models: each part brings predictions nearer to the original's."""

import pytest

from fpq_jax import Recipe
from fpq_jax._algorithms.recipe import DEFAULT_RECIPE
from fpq_jax._pipeline.job import JobOptions, open_job
from fpq_jax._pipeline.run import measure_original, run_progress, run_recipe


def divergences(model: str, states, **recipes: Recipe) -> dict[str, float]:
    """From the original, by recipe, on text that is held back."""
    options = JobOptions(model=model, num_samples=32, seq_len=256, max_windows=32)
    job = open_job(options, list(recipes.values()))
    original = measure_original(job, states)
    found = {}
    for name, recipe in recipes.items():
        with run_progress(job, recipe, None) as progress:
            report = run_recipe(job, recipe, progress, began=0.0, original=original, rows=False).report
        (row,) = report["perplexity"].values()
        found[name] = row["kl_divergence"]
    return found


@pytest.mark.full
def test_formats_options_and_bits_each_bring_their_part(tmp_path):
    recipes = {name: Recipe.load(name) for name in ("w4a8-fp-m2", "w4a8-nf4", DEFAULT_RECIPE)}
    assert recipes[DEFAULT_RECIPE].bits == 4.5
    stack = recipes["w4a8-nf4"].to_dict()
    stack["weight"] = stack["weight"] | {"format": "e2m1"}
    found = divergences(
        "demo-llama",
        tmp_path / "original",
        paper=recipes["w4a8-fp-m2"],
        stack=Recipe.from_dict(stack),
        nf4=recipes["w4a8-nf4"],
        default=recipes[DEFAULT_RECIPE],
    )
    assert found["default"] < found["nf4"] < found["stack"] < found["paper"], found
    assert found["default"] < 0.6 * found["paper"], found


@pytest.mark.full
def test_the_fisher_information_lowers_the_divergence_on_other_text(tmp_path):
    paper = Recipe.load("w4a8-fp-m2")
    fisher = Recipe.from_dict(paper.to_dict() | {"fisher": 0.2})
    found = divergences("demo-opt", tmp_path / "original", without=paper, fisher=fisher)
    assert found["fisher"] < found["without"], found

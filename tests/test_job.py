"""A job: its defaults, what its recipes share, what it refuses before work."""

import pytest

from fpq_jax import FpqError, Recipe
from fpq_jax._pipeline.job import JobOptions, default_calibration, open_job

RECIPES = [Recipe.load("w4a8-fp-lorc"), Recipe.load("w8a8-int")]


def prepare(model, text, recipes=RECIPES, **changes):
    options = {"calibration": str(text), "num_samples": 5, "seq_len": None, "eval": (), "max_windows": 3,
               "dtype": None, "seed": 0}  # fmt: skip
    return open_job(JobOptions(model=str(model), **(options | changes)), recipes)


def test_texts_dtype_and_name_are_the_commands_defaults(tiny_opt, text_file):
    job = prepare(tiny_opt, text_file)
    assert job.calibration.windows.shape == (5, 64) and job.dtype == "float32" and job.model_name == str(tiny_opt)
    assert {name: windows.shape for name, windows in job.evaluation.items()} == {
        f"{text_file} (held-back tail)": (3, 64)
    }
    named = prepare(tiny_opt, text_file, name="mine", dtype="bfloat16", eval=(str(text_file),), seq_len=16)
    assert (named.model_name, named.dtype, list(named.evaluation)) == ("mine", "bfloat16", [str(text_file)])
    assert [default_calibration(model) for model in (None, "demo-opt", "some/model")] == ["demo", "demo", "c4"]


def test_only_several_recipes_share_the_first_layer_and_ranks_are_filled_in(tiny_opt, text_file):
    job = prepare(tiny_opt, text_file)
    assert job.first_layer == {} and prepare(tiny_opt, text_file, RECIPES[:1]).first_layer is None
    assert job.recipe_for_model(RECIPES[0]).default.lorc.rank == 8


def test_every_recipe_is_checked_against_the_model(tiny_opt, text_file):
    wrong = Recipe.from_dict({"rules": [{"match": "*.up_proj", "quantize": False}]})
    with pytest.raises(FpqError, match="no Linear fits"):
        prepare(tiny_opt, text_file, [RECIPES[0], wrong])

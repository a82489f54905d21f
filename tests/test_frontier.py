"""The script on a tiny model: every point is measured, kept and gone on with, and another tool's stands beside them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from fpq_jax import FpqError, Recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("frontier")
    for name in ("frontier", "_runs"):
        sys.modules.pop(name, None)


def test_every_series_is_made_of_recipes(script):
    named = [(series, *one) for series in script.GRID for one in script.recipes(series)]
    assert len({recipe.name for *_, recipe in named}) == len(named) > 15
    of = {(series, name): recipe for series, name, recipe in named}
    assert of["w4a8-mixed", "5 bits"].bits == 5
    changed = of["paper, M2", "groups of 64"].default
    assert changed.spec.group_size == 64 and changed == Recipe.load("w4a8-fp-m2").with_group_size(64).default
    assert of["paper, M2 and LoRC", "rank 16"].default.lorc.rank == 16


def test_what_is_wrong_is_said_before_any_work(script, tmp_path, text_file):
    options = dict(model="demo-llama", eval=(str(text_file),), output=tmp_path / "out")
    for more, said in (
        ({"series": ("none",)}, "There is no series none"),
        ({"seeds": ()}, "at least one of --seeds"),
        ({"eval": ()}, "at least one --model and one --eval"),
        ({"peers": text_file}, "is no file of other tools' results"),
    ):
        with pytest.raises(FpqError, match=said):
            script.main(script.Options(**options | more))
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_points_of_two_seeds_beside_another_tools(script, tmp_path, tiny_llama, text_file, monkeypatch):
    grid = {
        "rounded": [{"recipe": "w4a8-fp-m2", "name": "16", "with": {"method": "round", "weight": {"group_size": 16}}}],
        "W8A8": [{"recipe": "w8a8-fp"}],
    }
    monkeypatch.setattr(script, "GRID", grid)
    text = {"perplexity": 400.0, "kl_divergence": 0.5, "same_token": 0.5}
    other = {"series": "other", "name": "tool", "seed": 0, "bits": 4.25, "seconds": None, "texts": {"text.txt": text}}
    (tmp_path / "peers.json").write_text(json.dumps({"points": [other]}))
    options = script.Options(
        model=str(tiny_llama), eval=(str(text_file),), output=tmp_path / "out", calibration=str(text_file),
        num_samples=2, max_windows=2, seeds=(0, 1), series=tuple(grid), peers=tmp_path / "peers.json",
    )  # fmt: skip
    script.main(options)
    result = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(p["series"], p["seed"]) for p in result["points"]] == [
        ("other", 0), ("rounded", 0), ("W8A8", 0), ("rounded", 1), ("W8A8", 1),
    ]  # fmt: skip
    (name,) = result["original"]
    lost = {p["series"]: p["texts"][name]["kl_divergence"] for p in result["points"]}
    assert 0 < lost["W8A8"] < lost["rounded"]
    markdown = (tmp_path / "out" / "frontier.md").read_text()
    assert markdown.count("\n| ") == 2 + 3 and " to " in markdown and "tool" in markdown
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    # the same command goes on behind what is there
    monkeypatch.setattr("fpq_jax._pipeline.run.quantize_parts", None)
    script.main(options)

"""The script on a tiny model: every point is measured, kept and gone on with, and another tool's stands beside them."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

from fpq_jax import FpqError, Recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


OTHER = """
import json, sys
from pathlib import Path
import numpy as np
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
windows = dict(np.load(given["--windows"]))
assert windows["calibration"].shape == windows["eval text.txt"].shape == (2, 64), windows
folder = Path(given["--output"])
folder.mkdir(exist_ok=True)
text = {"perplexity": 400.0, "kl_divergence": 0.5, "same_token": 0.5}
point = {"series": "other", "name": "tool", "bits": 4.25, "seconds": 1.0, "texts": {"text.txt": text}}
(folder / "tool.json").write_text(json.dumps(point))
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("frontier")
    for name in ("frontier", "frontier_peers", "_runs"):
        sys.modules.pop(name, None)


def test_every_series_is_made_of_recipes(script):
    grids = [script.read_grid(script.GRID), script.read_grid(SCRIPTS / "frontier_options.yaml")]
    named = [(series, *one) for grid in grids for series in grid for one in script.recipes(grid, series)]
    assert len({recipe.name for *_, recipe in named}) == len(named) > 30
    of = {(series, name): recipe for series, name, recipe in named}
    order, last = of["one after the other", "order: activation"].default, of["one after the other", "+ bits: 4.5"]
    assert (order.order, order.scale_search) == ("activation", False)
    assert replace(last, name="w4a8-mixed") == Recipe.load("w4a8-mixed")
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
        ({"llm_compressor": tmp_path}, "There is no Python .*; --llm-compressor names one"),
        ({"grid": text_file}, "is no grid of recipes"),
        ({"grid": tmp_path}, "is no grid of recipes"),
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
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))  # which is YAML, too
    monkeypatch.setattr(script, "PEERS", tmp_path / "peers.py")
    (tmp_path / "peers.py").write_text(OTHER)
    options = script.Options(
        model=str(tiny_llama), eval=(str(text_file),), output=tmp_path / "out", calibration=str(text_file),
        num_samples=2, max_windows=2, seeds=(0, 1), grid=tmp_path / "grid.yaml", llm_compressor=Path(sys.executable),
    )  # fmt: skip
    script.main(options)
    result = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(p["series"], p["seed"]) for p in result["points"]] == [
        ("rounded", 0), ("W8A8", 0), ("other", 0), ("rounded", 1), ("W8A8", 1), ("other", 1),
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
    # what fails beside us is said
    (tmp_path / "peers.py").write_text("raise SystemExit(3)")
    with pytest.raises(FpqError, match=r"llm-compressor failed, as it says above; it ran by .*peers.py --model"):
        script.main(options)


@pytest.mark.full
def test_what_another_tool_loses_by_its_logits(script, tmp_path):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    peers = importlib.import_module("frontier_peers")
    original = peers.load(write_checkpoint(tmp_path / "original", TINY_CONFIG, random_tensors(TINY_CONFIG)))
    rng = np.random.default_rng(0)
    near = {
        name: (w * (1 + 0.1 * rng.normal(size=w.shape))).astype(w.dtype)
        for name, w in random_tensors(TINY_CONFIG).items()
    }
    other = peers.load(write_checkpoint(tmp_path / "other", TINY_CONFIG, near))
    tokens = torch.from_numpy(rng.integers(0, TINY_CONFIG["vocab_size"], (5, 16)))
    got = peers.measure(original, list(peers.hidden_states(original, tokens)), other, tokens)
    p, q = (m(tokens).logits[:, :-1].detach().numpy().astype(np.float64) for m in (original, other))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    nll = -np.take_along_axis(log_q, tokens[:, 1:, None].numpy(), -1).mean()
    expected = np.exp(nll), (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-5)
    assert got["kl_divergence"] > 1e-3 and 0 < got["same_token"] < 1

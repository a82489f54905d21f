"""The script that runs the paper's tables: on two random models, resumed, refused."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import OPT_CONFIG, TINY_CONFIG

from fpq_jax import FpqError, Recipe
from fpq_jax._algorithms.recipe import recipe_names
from fpq_jax.models.llama import LlamaConfig
from fpq_jax.models.opt import OptConfig

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPES = {
    "llama-3b": (3200, 26), "llama-7b": (4096, 32), "llama-13b": (5120, 40), "llama-30b": (6656, 60),
    "opt-1.3b": (2048, 24), "opt-6.7b": (4096, 32), "opt-13b": (5120, 40), "opt-30b": (7168, 48),
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("reproduce_tables")


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["reproduce_tables.py", *map(str, arguments)])
    script.run_command(script.main, script.Options)


@pytest.mark.full
def test_a_table_of_two_models_is_kept_and_gone_on_with(
    script, monkeypatch, capsys, tmp_path, tiny_llama, tiny_opt, text_file
):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:2000])
    line = ["--model", tiny_llama, tiny_opt, "--eval", text_file, other, "--calibration", text_file, "--tables", "A.1",
            "--num-samples", 4, "--max-windows", 3, "--output", tmp_path / "out"]  # fmt: skip
    run(script, monkeypatch, *line)
    written = (tmp_path / "out" / "tables.json").read_text()
    markdown = (tmp_path / "out" / "tables.md").read_text()
    result = json.loads(written)
    assert result["texts"] == ["text.txt", "other.txt"]
    for title in ("tiny", "tiny-opt"):
        runs = result["models"][title]["runs"]
        for name in ("w4a8-fp-lorc", "w4a8-e3m0"):
            kept = json.loads((tmp_path / "out" / "runs" / title / f"{name}.json").read_text())
            values = [row["quantized"] for row in kept["perplexity"].values()]
            assert runs[name]["perplexity"] == values and runs[name]["mean"] == pytest.approx(sum(values) / 2)
            assert kept["layers"] and kept["recipe"]["lorc"]["rank"] == 8
            assert f"| {sum(values) / 2:.2f}: {values[0]:.2f} / {values[1]:.2f} |" in markdown
        (claim,) = result["claims"][title]
        assert claim["holds"] == (runs["w4a8-fp-lorc"]["mean"] <= runs["w4a8-e3m0"]["mean"])
        pairs = zip(runs["w4a8-fp-lorc"]["perplexity"], runs["w4a8-e3m0"]["perplexity"], strict=True)
        assert claim["holds_on_texts"] == sum(a <= b for a, b in pairs)
    capsys.readouterr()

    # one run is lost: it alone is done again, and comes to the same
    (tmp_path / "out" / "runs" / "tiny" / "w4a8-e3m0.json").unlink()
    run(script, monkeypatch, *line)
    assert [row for row in capsys.readouterr().out.splitlines() if "Quantizing" in row] == [
        f"Quantizing {tiny_llama} with w4a8-e3m0: 4 windows of 64 tokens of {text_file}"
    ]
    assert (tmp_path / "out" / "tables.json").read_text() == written
    (tmp_path / "out" / "runs" / "tiny-opt" / "w4a8-e3m0.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *line)
    assert "w4a8-e3m0.json is no finished run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        run(script, monkeypatch, *line, "--seed", 1)
    assert exit_.value.code == 2
    assert "is from another job (calibration, seed differ)" in capsys.readouterr().err


def test_the_papers_numbers_stand_beside_its_models(script):
    runs = {"w4a8-fp-lorc": {"mean": 9.5, "perplexity": [9.0, 10.0], "bits_per_weight": 4.2}}
    runs["w4a8-e3m0"] = runs[None] = runs["w4a8-fp-lorc"]
    result = {"texts": ["a", "b"], "claims": {"m": []}, "models": {"m": {"paper_model": "opt-13b", "runs": runs}}}
    rows = [row for row in script.PAPER["rows"] if row["table"] == "A.1" or row["recipe"] is None]
    text = script.markdown(
        script.Options(model=("m",), eval=("a",), output=Path("o"), tables=("1", "A.1")), rows, result
    )
    assert "| W16A16 |  | 9.50: 9.00 / 10.00 | 4.20 | 11.22: 10.13 / 12.34 / 11.20 |" in text
    assert "| E3M0 | w4a8-e3m0 | 9.50: 9.00 / 10.00 | 4.20 | 11.53 |" in text


def test_the_papers_models_are_recognized_by_their_shape(script):
    for name, (hidden, layers) in SHAPES.items():
        size = {"hidden_size": hidden, "num_hidden_layers": layers, "max_position_embeddings": 2048,
                "vocab_size": 32000 if name.startswith("llama") else 50272, "num_key_value_heads": None}  # fmt: skip
        llama = name.startswith("llama")
        config = (LlamaConfig if llama else OptConfig).from_hf({**(TINY_CONFIG if llama else OPT_CONFIG), **size})
        assert script.recognized("Llama" if llama else "Opt", config) == name
    assert script.recognized("Llama", LlamaConfig.from_hf(TINY_CONFIG)) is None
    grouped, channel = Recipe.load("w4a8-fp"), Recipe.load("w8a8-fp")
    assert script.for_paper_model(grouped, "llama-3b").default.spec.group_size == 320
    assert script.for_paper_model(grouped, "llama-7b") == grouped
    assert script.for_paper_model(channel, "llama-3b") == channel


def test_every_row_has_a_recipe_numbers_and_a_place_on_the_page(script):
    page = (SCRIPTS.parent / "docs" / "tables.md").read_text()
    for row in script.PAPER["rows"]:
        assert row["recipe"] in (None, *recipe_names())
        opts, llamas = ([m for m in row["paper"] if m.startswith(kind)] for kind in ("opt", "llama"))
        assert len(opts) == 4 and len(llamas) == (0 if row["table"] == "A.1" else 4)
        cell = (
            "the model as it is" if row["recipe"] is None else f"[`{row['recipe']}`](../configs/{row['recipe']}.yaml)"
        )
        assert f"| {row['table']} | {row['label']} | {cell} |" in page
        if row["table"] == "1":
            for mean, *texts in row["paper"].values():
                # the paper's own means, to the rounding of four printed numbers
                assert mean == pytest.approx(sum(texts) / 3, abs=0.02), row
    counted = yaml.safe_load((SCRIPTS / "zeroquant_fp.yaml").read_text())
    assert len({row["recipe"] for row in counted["rows"]}) == 15


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "no model folder /nowhere"),
        (["--eval", "absent.txt"], "no text file absent.txt"),
        (["--model", "demo-llama", "demo-llama"], "same name"),
        (["--tables"], "one of --tables"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_any_work(
    script, monkeypatch, capsys, tmp_path, tiny_llama, text_file, arguments, said
):
    line = {"--model": [tiny_llama], "--eval": [text_file], "--output": [tmp_path / "out"]}
    line[arguments[0]] = arguments[1:]
    with pytest.raises(SystemExit) as exit_:
        run(script, monkeypatch, *(part for name, values in line.items() for part in (name, *values)))
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_no_file(script, monkeypatch, tmp_path, tiny_llama, text_file):
    runs_module = sys.modules["_runs"]
    options = script.Options(model=(str(tiny_llama),), eval=(str(text_file),), output=tmp_path, num_samples=2,
                             max_windows=1, calibration=str(text_file))  # fmt: skip
    runs = runs_module.Runs(runs_module.prepare(options, str(tiny_llama), []), tmp_path / "runs")
    with pytest.raises(FpqError, match="no Linear fits"):
        runs.report(Recipe.from_dict({"rules": [{"match": "nothing", "quantize": False}]}))
    assert not list((tmp_path / "runs").glob("*"))

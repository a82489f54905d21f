"""The table and the picture of reports, on two that are made up; and the reports that are kept."""

import importlib
import json
import re
from pathlib import Path

import pytest

from fpq_jax import FpqError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("plot_summary")


def report(recipe, perplexity, bits):
    """Of a model with 1,000,000 quantized weights and 400,000 bytes of others."""
    return {
        "model": "models/tiny",
        "dtype": "bfloat16",
        "recipe": {"name": recipe},
        "perplexity": {"text/wiki.txt": {"original": 20.0, "quantized": perplexity, "tokens": 1270}},
        "layers": [{"shape": [1000, 400]}, {"shape": [600, 1000]}],
        "bits_per_weight": bits,
        "bytes": {"original": 2_400_000, "quantized": 400_000 + int(bits * 125_000)},
    }


def test_rows_are_the_original_and_then_from_large_to_small(script):
    summary = script.summarize([report("w4a8", 21.0, 4.0), report("w8a8", 20.1, 8.0)])
    assert summary[:3] == ("tiny", "wiki.txt", 1270)
    assert [row.name for row in summary.rows] == ["original, bfloat16", "w8a8", "w4a8"]
    assert [row.nbytes for row in summary.rows] == [2_400_000, 1_400_000, 900_000]
    assert [row.rest_bytes for row in summary.rows] == [400_000] * 3
    assert script.markdown(summary) == [
        "| recipe | perplexity | bits per quantized weight | size (MB) |",
        "| --- | --- | --- | --- |",
        "| original, bfloat16 | 20.00 | 16.00 | 2.4 |",
        "| `w8a8` | 20.10 (+0.5%) | 8.00 | 1.4 |",
        "| `w4a8` | 21.00 (+5.0%) | 4.00 | 0.9 |",
    ]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_prints_the_table_and_draws_the_picture(script, suffix, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the studies extra is not installed")
    for one in (report("w8a8", 19.9, 8.0), report("w4a8", 21.0, 4.0)):
        (tmp_path / f"{one['recipe']['name']}.json").write_text(json.dumps(one))
    pictures = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for picture in pictures:
        line = ["plot_summary.py", *sorted(map(str, tmp_path.glob("*.json"))), "--output", str(picture)]
        monkeypatch.setattr("sys.argv", line)
        script.run_command(script.main, script.Options)
    assert "| `w8a8` | 19.90 (-0.5%) |" in capsys.readouterr().out
    assert 5_000 < pictures[0].stat().st_size < 100_000
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    if suffix == "svg":
        assert "#ffffff" in pictures[0].read_text()  # a ground of its own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "models/other"}, "different models"),
        ({"dtype": "float32"}, "different models, dtypes"),
        ({"perplexity": {"text/wiki.txt": {"original": 20.0, "quantized": 21.0, "tokens": 99}}}, "evaluation windows"),
        (
            {"perplexity": {"text/wiki.txt": {"original": 23.0, "quantized": 21.0, "tokens": 1270}}},
            "evaluation windows",
        ),
        ({"perplexity": {"ptb": {"original": 20.0, "quantized": 21.0, "tokens": 1270}}}, "several texts"),
        ({"recipe": {"name": "w8a8"}}, "same recipe"),
    ],
)
def test_reports_that_cannot_stand_beside_each_other_are_refused(script, changes, said):
    with pytest.raises(FpqError, match=said):
        script.summarize([report("w8a8", 20.1, 8.0), report("w4a8", 21.0, 4.0) | changes])


def test_what_is_no_report_is_one_sentence(script, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["plot_summary.py", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit) as end:
        script.run_command(script.main, script.Options)
    assert end.value.code == 2 and "is no report" in capsys.readouterr().err


def test_kept_reports_can_stand_beside_each_other_and_name_no_folder_of_a_machine(script):
    texts = {
        path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks" / "smollm2").glob("*.json"))
    }
    for path, text in texts.items():
        assert not re.search(r'"(?:/|~|[A-Z]:\\)', text), f"{path} holds an absolute path"
    if texts:
        assert len(script.summarize([json.loads(text) for text in texts.values()]).rows) == len(texts) + 1

"""The outlier study on a random model, and the paper's headline on the demo models."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("outlier_study")


def test_the_study_writes_a_table_and_a_plot_and_keeps_its_runs(
    study, monkeypatch, capsys, tmp_path, tiny_opt, text_file
):
    line = ["--model", tiny_opt, "--eval", text_file, "--calibration", text_file, "--factors", 30, "--num-samples", 4,
            "--max-windows", 3, "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["outlier_study.py", *map(str, line)])
    study.run_command(study.main, study.Options)
    text = (tmp_path / "out" / "outliers.json").read_text()
    (row,) = json.loads(text)["models"]["tiny-opt"]
    assert row["factor"] == 30 and set(row) == {"factor", "original", *study.SCHEMES}
    markdown = (tmp_path / "out" / "outliers.md").read_text()
    assert all(f"{row[name]:.3f}" in markdown for name in ("original", *study.SCHEMES))
    assert (tmp_path / "out" / "outliers.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "out" / "runs" / "tiny-opt-x30" / "w8a8-fp.json").read_text())
    assert kept["model"] == "tiny-opt-x30"
    capsys.readouterr()
    study.run_command(study.main, study.Options)
    assert "Quantizing" not in capsys.readouterr().out and (tmp_path / "out" / "outliers.json").read_text() == text


@pytest.mark.parametrize("model", ["demo-llama", "demo-opt"])
def test_with_outliers_int8_activations_lose_ten_times_what_fp8_ones_do(study, monkeypatch, tmp_path, model):
    int8, fp8, *_ = study.SCHEMES
    options = study.Options(model=(model,), eval=("demo",), output=tmp_path, num_samples=8, seq_len=256, max_windows=24)
    monkeypatch.setattr(study, "SCHEMES", {name: study.SCHEMES[name] for name in (int8, fp8)})
    row = study.measure(options, model, 100.0)
    lost_int8, lost_fp8 = row[int8] - row["original"], row[fp8] - row["original"]
    assert lost_int8 > 10 * max(lost_fp8, 0.002 * row["original"])

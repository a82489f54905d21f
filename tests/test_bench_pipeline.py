"""The benchmark of the pipeline's stages, small; and its arithmetic."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_pipeline")


def test_every_stage_is_measured_and_written(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda: 1e11)
    bench.main(bench.Options(hidden=64, inner=128, layers=5, num_samples=3, seq_len=32, output=tmp_path))
    result = json.loads((tmp_path / "pipeline.json").read_text())
    assert set(result["seconds_per_layer"]) == set(bench.STAGES) and min(result["seconds_per_layer"].values()) > 0
    assert result["parameters"] == 5 * (4 * 64**2 + 3 * 64 * 128)
    text = (tmp_path / "pipeline.md").read_text()
    assert all(f"| {stage} |" in text for stage in bench.STAGES) and "OPT-175b" in text


def test_the_arithmetic_of_a_layer(bench):
    shape = bench.Shape(hidden=10, inner=20, layers=1, tokens=100, length=50)
    assert shape.weights == 4 * 100 + 3 * 200
    work = bench.flops(shape, rank=8)
    assert work["forward"] == 2 * 100 * 1000 + 4 * 100 * 50 * 10
    assert work["hessians"] - work["forward"] == 2 * 100 * (3 * 10**2 + 20**2)
    one, eight = (bench.h100(bench.PAPER["OPT-30b"], devices) for devices in (1, 8))
    assert eight["forward"] == pytest.approx(one["forward"] / 8) and one["gptq"] / 8 < eight["gptq"] < one["gptq"]
    assert one["model"] > eight["model"] > 48 * eight["read"] * 0.99

"""The benchmark of a model: what it makes of times, and that the parts that are not commands run."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fpq_jax import FpqError, text_windows

SCRIPTS = Path(__file__).parents[1] / "scripts"
OTHER = """
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open(given["--output"], "w").write(json.dumps({"tokens/s": 50.0 if "evaluate" in given["--part"] else 5.0}))
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("bench_model")
    for name in ("bench_model", "_runs"):
        sys.modules.pop(name, None)


@pytest.fixture
def options(bench, tmp_path):
    return bench.Options(
        model="demo-llama", calibration="demo", eval="demo", output=tmp_path / "out", num_samples=2, seq_len=64,
        max_windows=16, rows=(1, 2), prompt=8, new_tokens=3, repeats=3,
    )  # fmt: skip


def test_turns_are_told_as_median_and_range_beside_torch(bench, options, monkeypatch, tmp_path):
    turns = iter([3.0, 1.0, 200.0])
    monkeypatch.setattr(bench, "quantize", lambda _: {"whole command, s": next(turns)})
    monkeypatch.setattr(bench, "evaluate", lambda _, form: {"tokens/s": 70.0} if form == "fp8" else {})
    monkeypatch.setattr(bench, "generate", lambda *_: {"load, s": 2.0})
    monkeypatch.setattr(bench, "limits", lambda: {"float32": 400.0, "bfloat16": 800.0, "bandwidth": 20.0})
    monkeypatch.setattr(bench, "TORCH", tmp_path / "other.py")
    bench.TORCH.write_text(OTHER)
    bench.main(replace(options, torch=Path(sys.executable)))
    result = json.loads((options.output / "bench_model.json").read_text())
    assert result["measured"]["ours: quantize"] == {"whole command, s": [3.0, 1.0, 200.0]}
    assert result["model_size"] == {"linears": 4 * (3 * 256**2 + 3 * 256 * 704), "head": 4096 * 256}
    lines = (options.output / "bench_model.md").read_text().splitlines()
    assert "| whole command, s | 3.0 (1.0 to 200) | - |" in lines
    assert "| tokens/s | - | 70.0 (70.0 to 70.0) | - | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) |" in lines


def test_a_rate_is_what_more_windows_cost(bench, options, monkeypatch, tmp_path):
    def command(self, name, *arguments):
        windows = arguments[arguments.index("--max-windows") + 1]
        return 5 + 0.5 * windows, {"peak_memory_bytes": 7e6}

    monkeypatch.setattr(bench.Bench, "command", command)
    figures = bench.evaluate(bench.Bench(options, tmp_path, tmp_path), "packed")
    assert figures == {"tokens/s": pytest.approx(63 / 0.5), "start-up, s": pytest.approx(5), "peak memory, MB": 7}


def test_the_generator_is_timed_on_rows_of_the_text(bench, options, tmp_path):
    windows = tmp_path / "windows.npz"
    bench.np.savez(windows, evaluation=text_windows("demo", "demo-llama", 64))
    figures = bench._generate(bench.Bench(options, tmp_path, windows), "original")
    for rows in (1, 2):
        assert min(figures[f"{phase}, {rows} rows, tokens/s"] for phase in ("prefill", "decode")) > 0
    assert min(figures["load, s"], figures["compile, 1 rows, s"], figures["peak memory, MB"]) > 0


def test_the_limits_of_the_machine_are_measured(bench, monkeypatch):
    monkeypatch.setattr(bench, "_best", lambda run: (run(), 0.5)[1])
    found = bench.limits()
    assert found == {"float32": 2 * 2048**3 / 0.5e9, "bfloat16": 2 * 2048**3 / 0.5e9, "bandwidth": 4 * 2**27 / 0.5e9}


def test_what_is_wrong_is_said_before_any_work(bench, options):
    for more, said in (
        ({"max_windows": 8}, "max_windows is 8; it must be more than 8"),
        ({"rows": (0,)}, "must be at least 1"),
        ({"torch": Path("nowhere")}, "There is no Python nowhere"),
        ({"max_windows": 10**6}, "name a longer text"),
    ):
        with pytest.raises(FpqError, match=said):
            bench.main(replace(options, **more))

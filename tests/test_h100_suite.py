"""The suite in its tiny form: every part runs, every check passes, and what it writes is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[1] / "scripts" / "h100_suite.py"


def suite(*arguments):
    line = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_every_part_runs_in_its_tiny_form(tmp_path):
    out = tmp_path / "tiny.json"
    ran = suite("--tiny", "--output", out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(out.read_text())
    assert all(row["passed"] for row in result["correctness"]) and len(result["correctness"]) > 25
    assert set(result["ceilings"]) == set(result["datasheet"]) == {"fp8", "bf16", "fp32", "bandwidth"}
    counts = {"generation": 6 * 2, "gptq": 3, "kernel": 2 + 4 * 6 + 2 + 2 * 4, "linears": 4 * 7, "pipeline": 1}
    for part, cases in counts.items():
        assert len(result[part]) == cases, part
        assert f"## {part}" in ran.stdout
    assert [row["passed"] for row in result["kernel"] if "check" in row] == [True, True]
    timed = result["linears"] + [row for row in result["kernel"] if "variant" in row]
    torch = [row for row in timed if row["variant"].startswith("torch")]
    ours = [row for row in timed if row not in torch]
    assert all(row["seconds"] is None and row["note"] == "no torch with a GPU" for row in torch)
    for row in ours + result["generation"] + result["gptq"]:
        assert row["seconds"] > row["floor_seconds"] > 0
    assert all(0 < row["share_of_measured_ceiling"] for row in ours)
    assert result["pipeline"][0]["note"].startswith("extrapolated from 2 layers to 2")
    assert result["devices"] and result["versions"]["jax"]


def test_predictions_are_bytes_and_operations_over_the_datasheets_ceilings():
    ran = suite("--predict")
    assert ran.returncode == 0 and "## linears" in ran.stdout and "## generation" in ran.stdout
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines() if line.startswith("|")
    ]
    row = next(line for line in lines if line[:4] == ["LLaMA-7B", "gate_up", "4096", "cublas"])
    assert row[4] == f"{2 * 4096 * 4096 * 22016 / 1979e12 * 1e6:.1f} us"
    row = next(line for line in lines if line[:4] == ["LLaMA-7B", "down", "1", "cublas"])
    assert row[4] == f"{(11008 * 4096 + 2 * (11008 + 4096)) / 3350e9 * 1e6:.1f} us"
    assert set(row[5:-1]) == {"-"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name a file for the result"),
        (["--output", "/nowhere/x.json"], "cannot be written; name a file in a folder that exists"),
        (
            ["--parts", "linear"],
            "There is no part linear; the parts are kernel, correctness, generation, gptq, linears, pipeline",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, said):
    ran = suite("--tiny", *arguments)
    assert ran.returncode == 2 and said in ran.stdout


def test_a_part_that_fails_is_said_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import h100_suite

    def fail(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(h100_suite.PARTS, "linears", h100_suite.PARTS["linears"]._replace(run=fail))
    options = {"tiny": True, "predict": False, "parts": ["linears", "gptq"], "seconds": 60.0}
    out = tmp_path / "x.json"
    assert h100_suite.main(h100_suite.argparse.Namespace(output=out, **options)) == 1
    result = json.loads(out.read_text())
    assert result["linears"] == [{"note": "RuntimeError: no such kernel"}] and len(result["gptq"]) == 3


def test_a_check_that_was_not_made_has_not_passed(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from h100 import common, correctness

    monkeypatch.setattr(correctness, "on_gpu", lambda: True)
    rows = correctness.run(common.TINY, common.Clock(seconds=0.0), common.DATASHEET)
    assert len(rows) == 4 and not any(row["passed"] for row in rows)
    assert correctness.table(rows).count("FAILED | out of time") == 4


def test_a_kernel_that_ends_its_process_is_said(monkeypatch):
    """What was written before is kept."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from h100 import common, kernel

    monkeypatch.setattr(kernel, "_inside", _ends)
    rows = kernel.run(common.TINY, common.Clock(60.0), common.DATASHEET)
    assert rows[0] == {"check": "first", "value": 0.0, "passed": True}
    assert not rows[1]["passed"] and rows[1]["note"] == "its process ended with 3"
    assert "FAILED the kernel: its process ended with 3" in kernel.table(rows)


def _ends(write, *_):
    write([{"check": "first", "value": 0.0, "passed": True}])
    os._exit(3)

"""The benchmark script, on a small matrix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gptq.py"


def test_both_implementations_lose_the_same():
    pytest.importorskip("torch", reason="the torch extra is not installed")
    line = [sys.executable, SCRIPT, "--size", "256", "--group-size", "64", "--repeats", "1"]
    row = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert row["error"] == pytest.approx(row["torch_error"], rel=0.05)
    assert row["fpq_jax_seconds"] > 0 and row["torch_seconds"] > 0 and row["first_call_seconds"] > 0

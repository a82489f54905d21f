"""The training script on a little text: it learns, goes on where it stopped, and writes a checkpoint that loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.tokenizer import load_tokenizer

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_demo.py"
NORMS = {"llama": "input_layernorm.scale", "opt": "final_layer_norm.scale"}


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_it_trains_resumes_and_writes_a_hugging_face_folder(tmp_path, architecture):
    sentence = "The cat sat on the mat and looked at the moon . \n "
    for name in ("train", "valid"):
        (tmp_path / f"wiki.{name}.tokens").write_text(sentence * 3000)
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": sentence * 60}) + "\n" for _ in range(20)))
    out, work = tmp_path / "out", tmp_path / "work"
    for steps in ("1", "3"):
        line = [sys.executable, SCRIPT, "--architecture", architecture,
                "--wikitext", tmp_path, "--c4", tmp_path / "c4.jsonl", "--work-dir", work,
                "--output", out, "--steps", steps, "--batch-size", "1", "--evaluate-every", "100",
                "--validation-windows", "4"]  # fmt: skip
        subprocess.run(line, check=True, capture_output=True)
    rows = [json.loads(row) for row in (work / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]
    assert rows[1]["valid"]["wikitext2"] < rows[0]["valid"]["wikitext2"]
    checkpoint = HfCheckpoint(out)
    assert checkpoint.dtype == "bfloat16"
    params = checkpoint.read(np.float32)
    assert np.abs(params["layers.0." + NORMS[architecture]] - 1).max() < 0.5
    tokens = load_tokenizer(out)(sentence)["input_ids"]
    assert tokens[0] == 0 and load_tokenizer(out).decode(tokens[1:]) == sentence

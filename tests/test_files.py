"""Files that are there whole or not at all, locks, and digests."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest

from fpq_jax import FpqError
from fpq_jax._support.files import check_writable, code_digest, read_sealed, try_lock, write_json, write_sealed

DIGEST = "from fpq_jax._support.files import code_digest; print(code_digest())"


def test_json_appears_whole_and_a_failure_names_the_file(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError, match=r"nowhere.*a\.json"):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_what_was_sealed_and_changed_is_nothing(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed(path, {"layers": 3})
    assert read_sealed(path) == {"layers": 3}
    path.write_text(path.read_text().replace("3", "4"))
    assert read_sealed(path) is None and read_sealed(tmp_path / "missing") is None


def test_one_holds_a_lock(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert try_lock(first) and not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)


@pytest.mark.parametrize("changed", ["fpq_jax/quantize.py", "fpq_jax/_matmul/fp4_kernel/mosaic.py", "models/llama.py"])
def test_the_codes_digest_is_of_every_source(tmp_path, changed):
    """A kernel three folders deep too: compiled programs are kept for one state of the code."""
    sources = {"fpq_jax": Path(str(resources.files("fpq_jax"))), "models": Path(str(resources.files("fpq_jax.models")))}
    for name, folder in sources.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "demo_*"))

    def digest():
        line = [sys.executable, "-c", DIGEST]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert digest() == code_digest()
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    assert digest() != code_digest()


def test_json_goes_to_a_pipe_as_to_any(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_json(pipe, {"a": 1})
        assert json.loads(read.result(timeout=20)) == {"a": 1}
    assert pipe.is_fifo()


def test_where_a_report_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "no" / "r.json", tmp_path / "file" / "r.json"):
        with pytest.raises(FpqError, match=r"The report .* cannot be written; name a file in a folder"):
            check_writable(path)
    for path in (None, tmp_path / "new.json", tmp_path / "file", Path("/dev/null")):
        check_writable(path)

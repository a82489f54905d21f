"""Files that are there whole or not at all, locks, and digests."""

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest

from fpq_jax import FpqError
from fpq_jax._support.files import (
    check_ours,
    check_writable,
    code_digest,
    read_sealed,
    try_lock,
    umask,
    write_json,
    write_sealed,
)

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


def test_json_holds_no_numbers_that_are_none(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": -float("inf")}})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, 1.5, [None]], "b": {"c": None}}


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


def test_what_is_not_ours_is_told(tmp_path):
    folder = tmp_path / "out.unfinished"
    check_ours(folder)
    (folder / "programs").mkdir(parents=True)
    (folder / "fpq.lock").touch()
    check_ours(folder)
    link = folder / "programs" / "link"
    for target in (tmp_path / "mine", "/"):
        link.symlink_to(target)
        with pytest.raises(FpqError, match=r"programs/link is a link, and may lead to anywhere; remove .*unfinished"):
            check_ours(folder)
        link.unlink()
    (folder / "fpq.lock").chmod(0o666)
    with pytest.raises(FpqError, match=r"fpq\.lock is not your own, or others may write to it"):
        check_ours(folder)
    (folder / "fpq.lock").chmod(0o644)
    (tmp_path / "to").symlink_to(folder)
    with pytest.raises(FpqError, match="to is a link"):
        check_ours(tmp_path / "to")
    if os.geteuid() == 0:
        os.chown(folder / "programs", 65534, 65534)
        with pytest.raises(FpqError, match="programs is not your own"):
            check_ours(folder)


def test_json_is_not_written_through_a_name_that_was_prepared(tmp_path):
    """Of the former temporary name a link would have been followed."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "a.json.unfinished").symlink_to(tmp_path / "mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "a.json").is_symlink()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask()

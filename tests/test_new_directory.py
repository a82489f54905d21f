"""Folders that appear whole, beside what others write or have left (see also test_load_save.py)."""

import os
import time

import pytest

from fpq_jax import FpqError
from fpq_jax._support.new_directory import new_directory


def test_what_a_killed_process_left_is_removed_and_what_another_is_writing_is_not(tmp_path):
    old = time.time() - 3600
    left, recent = tmp_path / ".out.unfinished-left", tmp_path / ".out.unfinished-recent"
    for folder in (left, recent):
        folder.mkdir()
        (folder / "file").write_text("x")
    os.utime(left, (old, old))
    with pytest.raises(FpqError, match="filled by another command"), new_directory(tmp_path / "out") as writing:
        os.utime(writing, (old, old))
        with new_directory(tmp_path / "out") as other:
            assert writing.exists() and other.exists() and recent.exists() and not left.exists()
            (other / "a").write_text("first")
    assert (tmp_path / "out" / "a").read_text() == "first" and not writing.exists()

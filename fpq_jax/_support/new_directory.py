"""Folders that have their name only when everything is in them."""

import glob
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from fpq_jax._errors import FpqError
from fpq_jax._support.files import try_lock, umask

_JUST_MADE = 60.0  # seconds


def check_output(directory: Path) -> None:
    """FpqError if ``directory`` cannot become a new result."""
    if directory.exists() and os.path.ismount(directory.resolve()):
        raise FpqError(f"The output {directory} is where a disk is mounted; name a new folder in it.")
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FpqError(f"The output {directory} exists and is not empty; remove it or choose another --output.")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FpqError(f"The output {directory} cannot be made: {parent} is no writable folder.")


@contextmanager
def new_directory(directory: Path):
    """A folder to fill that becomes ``directory`` by one rename when the block ends well, and vanishes if it fails."""
    check_output(directory)
    directory = directory.resolve()  # a link to a folder cannot be renamed over
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.unfinished-"
    _remove_abandoned(directory.parent, prefix)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        try_lock(lock)
        yield unfinished
        unfinished.chmod(0o777 & ~umask())
        try:
            if directory.is_dir():
                directory.rmdir()  # empty, or this fails
            unfinished.rename(directory)
        except OSError as error:
            raise FpqError(
                f"The output {directory} was filled by another command meanwhile; choose another."
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed processes left of such folders; those of running ones are locked, or have just been made."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(FileNotFoundError):  # it has just got its name
            if time.time() - folder.stat().st_mtime < _JUST_MADE:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                if try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)

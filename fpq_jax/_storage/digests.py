"""Digests of all files of a finished folder, in one of its own, and whether the files are still what was written.

    digests.json    path of each other file in the folder -> SHA-256

Files that are not named there, as a person may add some, are not looked at.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from threading import Lock
from typing import Any

from fpq_jax._errors import FpqError
from fpq_jax._support.files import file_digest, folder_digests, read_json_object, write_json

DIGESTS = "digests.json"


def write_digests(folder: Path, known: dict[str, str] | None = None, but: Collection[str] = ()) -> None:
    """Of all that is in the folder ``but`` some; those that are ``known`` already are not computed again."""
    known = known or {}
    write_json(folder / DIGESTS, {**known, **folder_digests(folder, {DIGESTS, *known, *but})})


class Digests:
    """Those of a folder. ``check`` looks at each file once. Without digests.json, or unless ``verify``, it looks at
    none."""

    def __init__(self, folder: Path, *, verify: bool = True):
        self._folder = folder
        path = folder / DIGESTS
        self._left: dict[str, Any] = read_json_object(path) if verify and path.is_file() else {}
        if not all(isinstance(digest, str) for digest in self._left.values()):
            raise FpqError(f"{path} is damaged; copy the folder again.")
        self._lock = Lock()  # of threads that read beside each other

    def check(self, chosen: Callable[[str], bool]) -> None:
        """The files whose path is ``chosen``. FpqError names one that is not what was written."""
        with self._lock:
            for name in sorted(filter(chosen, self._left)):
                path = self._folder / name
                try:
                    found = file_digest(path)
                except OSError as error:
                    raise FpqError(f"{path} cannot be read ({error.strerror}); copy the folder again.") from error
                if found != self._left[name]:
                    raise FpqError(
                        f"{path} is not what was written: it is damaged or was changed. Copy the folder again, or, to "
                        "use it as it is, load it in Python with verify=False."
                    )
                del self._left[name]

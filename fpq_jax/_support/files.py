"""Files that are there whole or not at all, and digests that tell whether files are what they were."""

import fcntl
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

from fpq_jax._errors import FpqError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds. FpqError, which names the file, if it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FpqError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise FpqError(f"{path} is nested too deeply to be read as JSON.") from error
    except ValueError as error:  # no JSON, no UTF-8, an integer of thousands of digits
        raise FpqError(f"{path} is not valid JSON: {str(error).partition(';')[0]}.") from error
    if not isinstance(found, dict):
        raise FpqError(f"{path} does not hold a JSON object.")
    return found


def check_writable(path: Path | None) -> None:
    """FpqError if a report cannot be written there."""
    if path is None:
        return
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise FpqError(f"The report {path} cannot be written; name a file in a folder that exists and is yours.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON by one rename, on the disk before the name is; to a device or a pipe as to any."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    unfinished = None
    try:
        # a name that nobody else can have prepared, as a link to a file of ours
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.unfinished-", dir=path.parent)
        unfinished = Path(name)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o666 & ~umask())
        unfinished.rename(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Plain data with null for numbers that are none, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_ours(folder: Path) -> None:
    """FpqError if anything in a folder, or the folder, belongs to another user, may be changed by others, or is a link
    to elsewhere."""
    if not os.path.lexists(folder):
        return
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        owner = os.fstat(file.fileno()).st_uid  # of what we make there, which a network's file system may rename
    places = [folder, *(Path(top) / name for top, *names in os.walk(folder) for name in [*names[0], *names[1]])]
    for place in places:
        try:
            found = place.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode):
            raise FpqError(f"{place} is a link, and may lead to anywhere; remove {folder}, or choose another --output.")
        if found.st_uid != owner or found.st_mode & stat.S_IWOTH:
            raise FpqError(
                f"{place} is not your own, or others may write to it; remove {folder}, or choose another --output."
            )


def write_sealed(path: Path, value: Any) -> None:
    """``write_json`` with a digest beside the value."""
    write_json(path, {"sha256": json_digest(value), "value": value})


def read_sealed(path: Path) -> Any | None:
    """What ``write_sealed`` wrote; None if the file is missing, torn or changed."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        value = sealed["value"]
        return value if sealed["sha256"] == json_digest(value) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder that nobody has locked, until it is closed; False on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def json_digest(value: Any) -> str:
    """Of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path, but: Collection[str] = ()) -> dict[str, str]:
    """Of every file below a folder, by its path there, ``but`` some of these."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: file_digest(path) for name, path in named.items() if name not in but}


def files_digest(paths: list[Path]) -> str:
    """Of several files, their names included."""
    return json_digest([[path.name, file_digest(path)] for path in paths])


def code_digest() -> str:
    """Of this package's sources: another version may come to other numbers."""
    sources: dict[str, str] = {}
    for package in ("fpq_jax", "fpq_jax.models"):  # in a checkout models/ stands beside fpq_jax/
        folder = Path(str(resources.files(package)))
        named = {f"{package}/{name.relative_to(folder)}": name for name in folder.rglob("*.py")}
        sources |= {name: file_digest(path) for name, path in named.items() if not name.startswith("fpq_jax/models/")}
    return json_digest(sources)

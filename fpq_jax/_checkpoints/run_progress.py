"""A run's progress on the disk: killed at any moment, it goes on behind the last finished part.

Beside the output to be, OUT.unfinished holds

    fpq.lock        held by the run; the folder is its user's alone
    job.json        the facts that fingerprint the job
    progress/       a record for each finished part (what came of it, and a digest of every file of it), and what
                    else was measured
    model/          the result as it grows; it becomes OUT by one rename
    programs/       what XLA compiled: compiled again, a GPU's programs may round otherwise
    original/       the unquantized model's last hidden states for the evaluation's texts
    fisher/         the Fisher information of each layer's kernels, where the recipe needs it
    backward/       while that is measured, what the layers below are given, and the gradients

A record is written when its part is on the disk. When a run starts again, a part without a record, or whose files or
record are not as they were written, is made again.
"""

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from fpq_jax._errors import FpqError
from fpq_jax._storage.orbax_parts import PARAMS, Entry, PartsWriter, Sharding, abstract_part, read_part
from fpq_jax._support.console import size_text
from fpq_jax._support.files import check_ours, folder_digests, json_digest, read_sealed, try_lock, write_sealed
from fpq_jax._support.machine import free_disk
from fpq_jax._support.mesh import barrier, from_first, is_first
from fpq_jax._support.trees import Flat, stored_bytes

_LOCK, _JOB, _PROGRESS, _MODEL, _PROGRAMS = "fpq.lock", "job.json", "progress", "model", "programs"
_ORIGINAL, _FISHER, _BACKWARD = "original", "fisher", "backward"
SUFFIX = ".unfinished"
_METADATA = 64 * 2**10  # bytes that a part takes beside its arrays


def is_progress(folder: Path) -> bool:
    """Whether this is a run's progress, or inside of it."""
    known = lambda place: (place / _LOCK).is_file() or ((place / _JOB).is_file() and (place / _PROGRESS).is_dir())
    return any(known(place) for place in (folder, folder.absolute().parent))


def progress_folder(output: Path) -> Path:
    """Where the progress towards ``output`` is."""
    output = output.resolve()
    return output.with_name(output.name + SUFFIX)


def finished_layers(output: Path) -> int:
    """How many layers a run towards ``output`` has finished."""
    return len(list((progress_folder(output) / _PROGRESS).glob("layers.*.json")))


def is_published(output: Path) -> bool:
    """Whether a run was killed when its model was already in its place, its progress still there."""
    folder = progress_folder(output)
    check_ours(folder)
    return output.is_dir() and is_progress(folder) and not (folder / _MODEL).exists()


def remove_progress(output: Path, facts: dict[str, Any]) -> bool:
    """Remove what such a run left; whether it was the job with these facts."""
    folder = progress_folder(output)
    same = read_sealed(folder / _JOB) == facts
    barrier("what was left is known")
    if is_first():
        _remove(folder)
    return same


def _remove(folder: Path) -> None:
    """Remove a folder of progress; what makes it one goes last, so that it is known for one until then."""
    for place in folder.iterdir():
        if place.is_dir() and place.name != _PROGRESS:
            shutil.rmtree(place)
    shutil.rmtree(folder / _PROGRESS, ignore_errors=True)
    (folder / _JOB).unlink(missing_ok=True)
    shutil.rmtree(folder)


class RunProgress:
    """The progress of the job with these ``facts`` (plain data by name) towards the directory ``output``.

    FpqError if there is progress of another job; what differs is named. In several processes, on a file system that
    they share, all make one and call ``write``, ``read`` and ``finish`` together; the first one keeps the records.
    """

    def __init__(self, output: Path, facts: dict[str, Any]):
        self.output = output.resolve()  # a link to a folder cannot be renamed over
        self.folder = progress_folder(output)
        self.model = self.folder / _MODEL
        self._facts = json_digest(facts)
        if is_first():
            check_ours(self.folder)
            self._check(facts)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = self._locked()
            write_sealed(self.folder / _JOB, facts)
            for folder in (self._progress, self.model / PARAMS):
                folder.mkdir(parents=True, exist_ok=True)
            self._drop_what_is_not_whole()
        # one reads for all: a file system that is shared may show others something else for a while
        found = {path.stem: self._record(path) for path in self._progress.glob("*.json")} if is_first() else {}
        begun, self._records = from_first([self._facts, found])
        if begun != self._facts:
            raise FpqError(
                "The processes were started with different options or files; start the same command in each."
            )
        self._writer = PartsWriter(self.model)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    @property
    def programs(self) -> Path:
        """For ``kept_programs``."""
        return self.folder / _PROGRAMS

    @property
    def original(self) -> Path:
        """For what the quantized model is compared with."""
        return self.folder / _ORIGINAL

    @property
    def fisher(self) -> Path:
        """For ``measure_fishers``."""
        return self.folder / _FISHER

    @property
    def backward(self) -> Path:
        """For ``measure_fishers``."""
        return self.folder / _BACKWARD

    @property
    def _progress(self) -> Path:
        return self.folder / _PROGRESS

    def _check(self, facts: dict[str, Any]) -> None:
        if self.folder.exists() and not is_progress(self.folder) and any(self.folder.iterdir()):
            raise FpqError(f"{self.folder} is no progress of a run; remove it, or choose another --output.")
        records = [value for path in self._progress.glob("*.json") if (value := read_sealed(path)) is not None]
        if all(record["job"] == self._facts for record in records):
            return
        known = read_sealed(self.folder / _JOB)
        differing = "job.json, which says how, is damaged"
        if known is not None:
            names = [name for name in facts.keys() | known.keys() if facts.get(name) != known.get(name)]
            differing = f"{', '.join(sorted(names))} differ"
        raise FpqError(
            f"{self.folder} holds the progress of another job ({differing}); "
            "start that one again, remove the folder, or choose another --output."
        )

    def _locked(self) -> IO[str]:
        """A file that this process has locked for as long as it lives; FpqError if another one has."""
        descriptor = os.open(self.folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        file = open(descriptor, "w", encoding="utf-8")
        if not try_lock(file.fileno()):
            raise FpqError(f"Another process is working on {self.folder}; wait for it, or end it.")
        file.write("held by the run that is working here\n")
        return file

    def _drop_what_is_not_whole(self) -> None:
        records = {path.stem: self._record(path) for path in self._progress.glob("*.json")}
        for place in (self.model / PARAMS).iterdir():
            record = records.get(place.name)
            if record is None or not place.is_dir() or folder_digests(place) != record["files"]:
                shutil.rmtree(place) if place.is_dir() else place.unlink()
                records[place.name] = None
        known = (records.get(_PROGRAMS) or {"value": {}})["value"]
        for program, digest in self._program_digests().items():
            if known.get(program) != digest:  # it was being written, or was changed
                (self.programs / program).unlink()
        for path in self._progress.iterdir():
            record = records.get(path.stem)
            if record is None or ("files" in record and not (self.model / PARAMS / path.stem).is_dir()):
                path.unlink()

    def _program_digests(self) -> dict[str, str]:
        """Without the files in which JAX notes when a program was last used."""
        return {name: digest for name, digest in folder_digests(self.programs).items() if not name.endswith("-atime")}

    def _record(self, path: Path) -> dict[str, Any] | None:
        """A record of this very job, or None."""
        sealed = read_sealed(path)
        return sealed["record"] if sealed is not None and sealed.get("job") == self._facts else None

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """By name of each finished part: {"entry": ..., and what ``write`` was told of it}."""
        return {name: record for name, record in self._records.items() if "files" in record}

    def measured(self, name: str) -> Any | None:
        """What ``keep`` kept under this name."""
        record = self._records.get(name)
        return None if record is None else record["value"]

    def keep(self, name: str, value: Any) -> None:
        """Keep plain data that need not be measured again."""
        self._records[name] = {"value": value}
        if is_first():
            write_sealed(self._progress / f"{name}.json", {"job": self._facts, "record": self._records[name]})

    def write(self, name: str, params: Flat, *, results: list[Any], seconds: dict[str, float]) -> None:
        """Write a part in the background; results and seconds by stage are plain data that goes into its record."""
        self.wait()
        began = time.perf_counter()
        size = stored_bytes(params) + _METADATA
        if (free := free_disk(self.model)) < size:
            raise FpqError(
                f"{self.folder} has {size_text(free)} left and {name} takes {size_text(size)}; "
                "make room there and start the same command again to go on."
            )
        entry = self._writer.write(name, params)
        record = {"entry": entry, "results": results, "seconds": seconds}
        self._writing = self._thread.submit(self._finish_part, name, record, began)

    def _finish_part(self, name: str, record: dict[str, Any], began: float) -> None:
        self._writer.wait()
        record["write_seconds"] = time.perf_counter() - began
        if is_first():
            record = {**record, "files": folder_digests(self.model / PARAMS / name)}
            write_sealed(self._progress / f"{name}.json", {"job": self._facts, "record": record})
            self.keep(_PROGRAMS, self._program_digests())
        self._records[name] = record | {"files": record.get("files")}

    def wait(self) -> None:
        """Until all that was given is on the disk, with its record."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def read(self, name: str, sharding: Sharding) -> Flat:
        """A finished part."""
        return read_part(self.model, name, self.parts[name]["entry"], sharding)

    def written(self) -> int:
        """Bytes of the finished parts on the disk."""
        return sum(path.stat().st_size for path in self.model.rglob("*") if path.is_file())

    def recorded(self, name: str, key: str) -> Any:
        """What ``write`` was told of a finished part."""
        return self._records[name][key]

    def stages(self) -> dict[str, float]:
        """Seconds of all parts by stage, their writing among them, which is done beside the others."""
        total: dict[str, float] = {}
        for record in self.parts.values():
            for stage, seconds in {**record["seconds"], "write": record["write_seconds"]}.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return {stage: round(seconds, 3) for stage, seconds in total.items()}

    def abstract(self) -> Flat:
        """All parameters of the finished parts, without values."""
        return {path: leaf for entry in self.entries().values() for path, leaf in abstract_part(entry).items()}

    def entries(self) -> dict[str, Entry]:
        """The entry of each finished part."""
        return {name: record["entry"] for name, record in self.parts.items()}

    def digests(self) -> dict[str, str]:
        """Of each finished part's files, by their paths in the model's folder."""
        of_parts = {name: record["files"] for name, record in self.parts.items()}
        return {f"{PARAMS}/{name}/{file}": found for name, files in of_parts.items() for file, found in files.items()}

    def finish(self) -> None:
        """The model becomes the output. All that belongs to it must have been written to ``model``."""
        self.wait()
        barrier("the model is whole")
        if is_first():
            if self.output.is_dir():
                self.output.rmdir()  # empty, or this fails
            self.model.rename(self.output)
            _remove(self.folder)
        barrier("the model is in its place")

    def close(self) -> None:
        """End the background's threads; what is being written is waited for."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()
            if is_first():
                self._lock.close()

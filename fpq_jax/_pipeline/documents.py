"""Texts as documents, read in a stream: named data sets by the paper's protocol, files, and the demo text.

A SPEC is one of

    wikitext2, ptb, c4      the data sets, by GPTQ's protocol (paper: 4.1), fetched by Hugging Face datasets
    wikitext2:FILE          a file of theirs, a line for each row, by the same protocol; ptb:FILE likewise
    demo                    what the demo models were trained on, or not trained on
    FILE                    .txt, .raw, .tokens: one document; .jsonl, .json, .ndjson: a document in the "text" of each
                            line, or of each row of an array; .parquet: of each row; all but this may be .gz
    FILE:KEY                the same with another field than "text"
"""

import gzip
import importlib.util
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from fpq_jax._checkpoints.demo import demo_topics
from fpq_jax._errors import FpqError

Split = Literal["calibration", "evaluation"]

C4 = "c4"
_PROTOCOLS = ("wikitext2", "ptb")  # those that a file can have
_DATA_SETS = (*_PROTOCOLS, C4)
_TEXT = (".txt", ".raw", ".tokens")
_JSON = (".jsonl", ".json", ".ndjson")
_PARQUET = ".parquet"
_SPECS = (
    "wikitext2, ptb, c4, demo, or the path of a .txt, .raw, .tokens, .jsonl, .json (each also .gz) or .parquet file"
)
_C4_EVALUATION = 1100  # documents


@dataclass(frozen=True)
class Source:
    """A SPEC taken apart. name: of a data set or its protocol, "demo", or "" for a plain file. path: of a file, or
    None. key: of the field that a row's text is in."""

    spec: str
    name: str
    path: Path | None = None
    key: str = "text"

    @property
    def suffix(self) -> str:
        """Of the file, without .gz, in small letters."""
        assert self.path is not None
        name = self.path.name.lower().removesuffix(".gz")
        return name[name.rfind(".") :] if "." in name else ""

    @property
    def has_rows(self) -> bool:
        """Whether it is a file of documents, which are joined to evaluate."""
        return self.name == "" and self.suffix in (*_JSON, _PARQUET)


def source(spec: str) -> Source:
    """FpqError if ``spec`` names no known data set and no file that could be read as text."""
    if spec == "demo":
        return Source(spec, spec)
    if spec in _DATA_SETS:
        if "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None:
            raise FpqError(
                f"The text {spec} is fetched with the package datasets, which is not installed; "
                "pip install 'fpq-jax[data]', or name a file."
            )
        return Source(spec, spec)
    name, _, rest = spec.partition(":")
    if name in _PROTOCOLS and rest:
        found = Source(spec, name, Path(rest).expanduser())
        return _checked(found, _TEXT)
    found = Source(spec, "", Path(spec).expanduser())
    before, _, key = spec.rpartition(":")
    if not found.path.is_file() and before and key:  # type: ignore[union-attr]
        other = Source(spec, "", Path(before).expanduser(), key)
        if other.has_rows:
            found = other
    return _checked(found, (*_TEXT, *_JSON, _PARQUET))


def _checked(found: Source, suffixes: tuple[str, ...]) -> Source:
    if found.suffix not in suffixes:
        raise FpqError(f"{found.spec!r} is no text that can be read; name {_SPECS}.")
    if not found.path.is_file():  # type: ignore[union-attr]
        raise FpqError(f"There is no text file {found.path}.")
    if found.suffix == _PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise FpqError(f"{found.path} is read with pyarrow, which is not installed; pip install 'fpq-jax[data]'.")
    return found


def documents(found: Source, split: Split, characters: int | None = None) -> Iterator[str]:
    """The texts of a source, one after the other, of a file with one alone at most so many ``characters``."""
    if found.name == "demo":
        yield "\n\n".join(demo_topics(held_out=split == "evaluation"))
    elif found.path is None:
        yield from _data_set(found.name, split)
    else:
        try:
            yield from _of_file(found, characters)
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise FpqError(f"{found.path} cannot be read as UTF-8 text: {error}.") from error


def _of_file(found: Source, characters: int | None) -> Iterator[str]:
    if found.suffix == _PARQUET:
        yield from _parquet(found)
        return
    path = found.path
    assert path is not None
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        if found.name == "wikitext2":
            # as datasets has its rows: lines with their ends, but for those of white space
            yield "\n\n".join(line if line.strip() else "" for line in file)
        elif found.name == "ptb":
            yield " ".join(line.strip() for line in file)
        elif found.suffix in _TEXT:
            yield file.read(-1 if characters is None else characters)
        else:
            yield from _json(found, file)


def _json(found: Source, file: TextIO) -> Iterator[str]:
    """Of an array, or of a row in each line."""
    first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            rows = json.loads(first + file.read())
        except (ValueError, RecursionError) as error:
            raise FpqError(f"{found.path} is no JSON array of documents ({type(error).__name__}).") from error
        for number, row in enumerate(rows, 1):
            yield _text_of(found, row, f"row {number}")
        return
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield _text_of(found, row, f"line {number}")


def _parquet(found: Source) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(found.path) as file:
            if found.key not in file.schema_arrow.names:
                raise FpqError(
                    f"{found.path} has no column {found.key!r}; it has {', '.join(file.schema_arrow.names)}."
                )
            number = 0
            for batch in file.iter_batches(columns=[found.key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text_of(found, {found.key: value}, f"row {number}")
    except pyarrow.ArrowException as error:
        raise FpqError(f"{found.path} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error


def _text_of(found: Source, row: Any, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(found.key), str):
        raise FpqError(f'{found.path}, {where}, is no JSON object with a "{found.key}" that is a text.')
    return row[found.key]


def _data_set(name: str, split: Split) -> Iterator[str]:
    """WikiText-2 raw, PTB or C4 through Hugging Face datasets."""
    import datasets
    import huggingface_hub

    # its retries would be told one by one; the sentence below tells the outcome
    huggingface_hub.logging.set_verbosity_error()
    train = split == "calibration"
    try:
        if name == "wikitext2":
            part = "train" if train else "test"
            yield "\n\n".join(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
        elif name == "ptb":
            # the hub's own Parquet conversion; the data set itself is a script, which datasets no longer runs
            rows = datasets.load_dataset(
                "ptb-text-only/ptb_text_only",
                revision="refs/convert/parquet",
                split="train" if train else "test",
            )
            yield " ".join(rows["sentence"])
        else:
            file = "en/c4-train.00000-of-01024.json.gz" if train else "en/c4-validation.00000-of-00008.json.gz"
            rows = datasets.load_dataset("allenai/c4", data_files=file, split="train", streaming=True)
            yield from (row["text"] for row in itertools.islice(rows, None if train else _C4_EVALUATION))
    except Exception as error:  # datasets raises many kinds; the hub's own message is long and about URLs
        raise FpqError(
            f"The data set {name} cannot be fetched ({type(error).__name__}); name a local text instead: {_SPECS}."
        ) from error

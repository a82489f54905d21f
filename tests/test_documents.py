"""Texts as people have them: each kind of file gives its documents, or one sentence that names it."""

import gzip
import json

import pytest

from fpq_jax import FpqError
from fpq_jax._pipeline.documents import documents, source

TEXTS = ["one\ntwo", "drei 🙂", " "]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))


def read(spec, characters=None):
    return list(documents(source(str(spec)), "evaluation", characters))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo", ["one\ntwo"]),
        ("a.TXT", "\ufeffone", ["one"]),
        ("a.raw.gz", "one", ["one"]),
        ("a.jsonl", LINES, TEXTS),
        ("a.JSONL", "\ufeff" + LINES.replace("\n", "\r\n\r\n"), TEXTS),
        ("c4-train.00000-of-01024.json.gz", LINES, TEXTS),
        ("a.ndjson", LINES.rstrip(), TEXTS),
        ("a.json", "\n" + json.dumps([{"text": text} for text in TEXTS], indent=2), TEXTS),
        ("a.jsonl", "", []),
        ("a.json", "[]", []),
    ],
)
def test_files_give_their_documents(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert read(path) == expected


def test_other_fields_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert read(f"{tmp_path / 'a.jsonl'}:body") == TEXTS
    with pytest.raises(FpqError, match=r'a\.jsonl, line 1, is no JSON object with a "text"'):
        read(tmp_path / "a.jsonl")
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    parquet.write_table(pyarrow.table({"text": TEXTS, "body": ["x", None, "z"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS
    with pytest.raises(FpqError, match=r'a\.parquet, row 2, is no JSON object with a "body"'):
        read(f"{tmp_path / 'a.parquet'}:body")
    with pytest.raises(FpqError, match=r"no column 'other'; it has text, body"):
        read(f"{tmp_path / 'a.parquet'}:other")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(FpqError, match=r"b\.parquet cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_files_of_data_sets_have_their_protocol(tmp_path):
    (tmp_path / "wiki.raw").write_text(" \n = A = \n \n text . \n")
    assert read(f"wikitext2:{tmp_path / 'wiki.raw'}") == ["\n\n = A = \n\n\n\n\n text . \n"]
    (tmp_path / "ptb.txt").write_text(" no it was \n <unk> n't \n")
    assert read(f"ptb:{tmp_path / 'ptb.txt'}") == ["no it was <unk> n't"]
    for name in ("wikitext2", "ptb"):
        with pytest.raises(FpqError, match="no text that can be read"):
            source(f"{name}:{tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize(
    ("row", "where"),
    [({"text": 7}, 4), ({"text": None}, 4), ({"text": ["a"]}, 4), (["a"], 4), ("{", 4), ({"Text": "a"}, 4), (3, 4)],
)
def test_a_row_that_is_no_document_is_named(tmp_path, row, where):
    lines = [{"text": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in lines) + (row if isinstance(row, str) else json.dumps(row))
    )
    with pytest.raises(FpqError, match=rf"a\.jsonl, line {where}, is no JSON object"):
        read(tmp_path / "a.jsonl")
    if not isinstance(row, str):
        (tmp_path / "a.json").write_text(json.dumps([*lines, row]))
        with pytest.raises(FpqError, match=rf"a\.json, row {where}, is no JSON object"):
            read(tmp_path / "a.json")


def test_what_is_damaged_is_named(tmp_path):
    packed = bytearray(gzip.compress(LINES.encode() * 50))
    for i in range(len(packed) // 2, len(packed) // 2 + 20):
        packed[i] ^= 255
    for name, content in (
        ("a.jsonl.gz", bytes(packed)),
        ("b.jsonl.gz", gzip.compress(LINES.encode())[:-9]),
        ("c.txt.gz", b"plain"),
        ("d.txt", b"\xff\xfe\xff"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FpqError, match=f"{name} cannot be read as UTF-8 text"):
            read(tmp_path / name)
    (tmp_path / "e.json").write_text("[" * 100_000)
    with pytest.raises(FpqError, match=r"e\.json is no JSON array of documents"):
        read(tmp_path / "e.json")
    for spec, said in (
        ("a.pdf", "is no text"),
        (str(tmp_path / "no.txt"), "There is no text file"),
        ("", "is no text"),
    ):
        with pytest.raises(FpqError, match=said):
            source(spec)


def test_home_and_names_with_colons(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:b.jsonl").write_text(LINES)
    assert read("~/a:b.jsonl") == TEXTS
    assert read(tmp_path / "a:b.jsonl") == TEXTS
    assert read(f"~/a:b.jsonl:{'text'}") == TEXTS

import gzip
import json
import sys
import types

import numpy as np
import pytest
from conftest import write_tokenizer

from fpq_jax import FpqError
from fpq_jax._pipeline.text import calibration_text, check_spec, evaluation_windows
from fpq_jax._pipeline.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def test_evaluation_cuts_the_text_once_tokenized_into_whole_windows(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    windows = evaluation_windows(str(path), tokenizer, length=16, vocab_size=300)
    tokens = tokenizer("abcdefghij" * 10)["input_ids"]
    assert len(tokens) == 101 and tokens[0] == 256
    np.testing.assert_array_equal(windows.ravel(), tokens[:96])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_documents_are_joined_to_evaluate_and_kept_apart_to_calibrate(tokenizer, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    opened = gzip.open(path, "wt") if suffix.endswith("gz") else path.open("w")
    with opened as file:
        file.write('{"text": "abcdefg"}\n\n{"text": "hijklmn", "url": "x"}\n')
    evaluation = evaluation_windows(str(path), tokenizer, length=8, vocab_size=300)
    assert tokenizer.decode(evaluation.ravel()) == "<s>abcdefg hijklmn"
    windows = calibration_text(
        str(path), tokenizer, num_samples=2, length=8, seed=0, hold_back=False, vocab_size=300
    ).windows
    assert sorted(tokenizer.batch_decode(windows)) == ["<s>abcdefg", "<s>hijklmn"]


def test_calibration_draws_without_overlap_and_never_from_the_tail(tokenizer, text_file):
    def draw(seed, n=20):
        return calibration_text(
            str(text_file), tokenizer, num_samples=n, length=32, seed=seed, hold_back=True, vocab_size=300
        )

    whole = evaluation_windows(str(text_file), tokenizer, length=32, vocab_size=300)
    first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first.windows, again.windows)
    assert (first.windows != other.windows).any()
    np.testing.assert_array_equal(first.tail, whole[-len(first.tail) :])
    np.testing.assert_array_equal(first.tail, other.tail)
    position = {tuple(row): i for i, row in enumerate(whole.tolist())}
    drawn = [position[tuple(row)] for row in first.windows.tolist()]
    assert len(set(drawn)) == 20 and max(drawn) < len(whole) - len(first.tail)
    everything = draw(0, n=10_000)
    assert len(everything.windows) + len(everything.tail) == len(whole)


def test_of_a_large_file_no_more_is_read_than_the_windows_need(tokenizer, tmp_path, monkeypatch):
    """And of one that is not larger all of it, so that windows are drawn from everywhere."""
    import fpq_jax._pipeline.text as module

    monkeypatch.setattr(module, "_READ_CHARACTERS", 4000)
    monkeypatch.setattr(module, "_TOKENIZED_TOGETHER", 300)
    seen = []

    def counted(documents):
        for document in documents:
            seen.append(len(document))
            yield document

    read = module.documents
    monkeypatch.setattr(module, "documents", lambda *arguments: counted(read(*arguments)))
    draw = lambda path: (
        calibration_text(str(path), tokenizer, num_samples=3, length=8, seed=0, hold_back=False, vocab_size=300).windows
    )
    row = json.dumps({"text": "abcdefg hijklmnop " * 5}) + "\n"
    windows = {}
    for rows in (40, 5000):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(row * rows)
        windows[rows] = draw(path)
        assert sum(seen) == 90 * min(rows, 45)
        seen.clear()
    monkeypatch.setattr(module, "_TOKENIZED_TOGETHER", 10**9)
    np.testing.assert_array_equal(draw(tmp_path / "40.jsonl"), windows[40])
    (tmp_path / "one.txt").write_text("abcdefg hijklmnop " * 5000)
    seen.clear()
    draw(tmp_path / "one.txt")
    assert seen == [4000]


def test_the_demo_texts_tail_is_what_the_demo_model_never_saw(tokenizer):
    drawn = calibration_text("demo", tokenizer, num_samples=4, length=64, seed=0, hold_back=True, vocab_size=300)
    np.testing.assert_array_equal(drawn.tail, evaluation_windows("demo", tokenizer, length=64, vocab_size=300))
    assert drawn.tail_name == "demo"


@pytest.mark.parametrize(
    ("content", "said"),
    [("abc", "less than one window of 16"), ("", "less than one window"), (b"\xff\xfe\xff", "cannot be read as UTF-8")],
)
def test_a_text_that_cannot_serve_is_named(tokenizer, tmp_path, content, said):
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FpqError, match=said):
        evaluation_windows(str(path), tokenizer, length=16, vocab_size=300)


def test_bad_specs_lines_and_vocabularies(tokenizer, tmp_path, text_file):
    with pytest.raises(FpqError, match=r"There is no text file .*absent\.txt"):
        check_spec(str(tmp_path / "absent.txt"))
    with pytest.raises(FpqError, match=r"'wikitext3' is no text.*wikitext2, ptb, c4, demo"):
        check_spec("wikitext3")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(FpqError, match="line 2"):
        evaluation_windows(str(bad), tokenizer, length=2, vocab_size=300)
    with pytest.raises(FpqError, match="do not belong together"):
        evaluation_windows(str(text_file), tokenizer, length=16, vocab_size=200)
    one = tmp_path / "one.txt"
    one.write_text("abcdefghijklmnopq")
    with pytest.raises(FpqError, match="no tail can be held back"):
        calibration_text(str(one), tokenizer, num_samples=2, length=16, seed=0, hold_back=True, vocab_size=300)


@pytest.fixture
def fake_datasets(monkeypatch):
    """datasets with tiny stand-ins that have the real ones' names, columns and splits."""
    calls = []

    def load_dataset(name, config=None, *, split, revision=None, data_files=None, streaming=False):
        calls.append((name, config, split, revision, data_files, streaming))
        if name == "Salesforce/wikitext":
            return {"text": ["", " = A = ", f" {split} . "]}
        if name == "ptb-text-only/ptb_text_only":
            return {"sentence": ["no it was", f"{split} <unk>"]}
        return iter([{"text": f"document {i} of {data_files}"} for i in range(5000)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def text_of(windows, tokenizer):
    return tokenizer.decode(windows.ravel(), skip_special_tokens=True)


def test_named_data_sets_follow_the_papers_protocol(tokenizer, fake_datasets):
    evaluate = lambda spec, n: text_of(evaluation_windows(spec, tokenizer, length=n, vocab_size=300), tokenizer)
    assert evaluate("wikitext2", 10) == "\n\n = A = \n\n test . "[:19]
    assert evaluate("ptb", 20) == "no it was test <unk>"[:19]
    c4 = evaluation_windows("c4", tokenizer, length=64, vocab_size=300)
    assert c4.shape == (256, 64)
    assert text_of(c4, tokenizer).startswith("document 0 of en/c4-validation.00000-of-00008.json.gz document 1 of")
    calibration_text("c4", tokenizer, num_samples=2, length=64, seed=0, hold_back=True, vocab_size=300)
    assert fake_datasets[-1][4:] == ("en/c4-train.00000-of-01024.json.gz", True)
    calibration_text("wikitext2", tokenizer, num_samples=1, length=4, seed=0, hold_back=False, vocab_size=300)
    assert fake_datasets[-1][2] == "train"


def test_a_data_set_out_of_reach_says_how_to_name_a_file(tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("https://very.long/url")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FpqError, match=r"ptb cannot be fetched \(ConnectionError\); name a local text") as caught:
        evaluation_windows("ptb", tokenizer, length=8, vocab_size=300)
    assert "\n" not in str(caught.value) and json.dumps(str(caught.value)).count("http") == 0

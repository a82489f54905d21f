"""Tokenizers as folders have them: what is taken splits text as its own file says."""

import json

import pytest
from conftest import write_tokenizer

from fpq_jax import FpqError
from fpq_jax._pipeline.tokenizer import load_tokenizer

TEXT = "the fox jumps, 12 cafés 🙂\n"


def test_it_splits_text_as_its_own_file_says(tmp_path):
    import tokenizers

    write_tokenizer(tmp_path)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == own.encode(TEXT).ids
    own.enable_truncation(3)
    own.enable_padding(length=500)
    own.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path)


def test_one_that_transformers_misreads_is_refused(tmp_path, monkeypatch):
    import tokenizers

    write_tokenizer(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.normalizer = tokenizers.normalizers.Lowercase()
    monkeypatch.setattr(tokenizers, "Tokenizer", type("Other", (), {"from_file": staticmethod(lambda path: other)}))
    with pytest.raises(FpqError, match=r"transformers 5\..* splits text otherwise than .*tokenizer\.json says"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "{}", "", "[1]"])
def test_a_damaged_one_is_said(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FpqError, match="tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_one_is_said(tmp_path):
    with pytest.raises(FpqError, match="No tokenizer can be loaded"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(FpqError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_sentencepieces_file_alone_is_enough(tmp_path):
    """With the beginning token in front, as LLaMA's tokenizer always had it."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for told, beginning in (({}, [1]), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [1])):
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **told}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(folder)("the fox jumps 🙂")["input_ids"] == beginning + own.encode("the fox jumps 🙂")

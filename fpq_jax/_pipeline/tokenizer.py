"""The tokenizer of a model folder, by transformers, and whether it splits text as its own tokenizer.json says."""

import os
from pathlib import Path
from typing import Any

from fpq_jax._errors import FpqError
from fpq_jax._support.files import read_json_object

_PROBE = "The quick (brown) fox,  can't jump\n\n\tover 1234567 lazy dogs: naïve café, 你好 мир 🙂 x**2 == f(x)\n"


def load_tokenizer(folder: Path) -> Any:
    """No remote code is run. FpqError if there is none, it is damaged, or transformers misreads it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_options(folder))
    except Exception as error:  # transformers raises many kinds, all about the files in the folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FpqError(
            f"No tokenizer can be loaded from {folder} ({reason}); copy the model's tokenizer files there."
        ) from error
    _check(folder, tokenizer)
    return tokenizer


def _options(folder: Path) -> dict[str, Any]:
    """transformers 4 put the beginning token before a text where SentencePiece's file is all there is; 5 does not."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return {}
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.is_file() else {}
    llama = str(config.get("tokenizer_class", "LlamaTokenizer")).startswith("LlamaTokenizer")
    return {"add_bos_token": True} if llama and config.get("add_bos_token") is None else {}


def _check(folder: Path, tokenizer: Any) -> None:
    path = folder / "tokenizer.json"
    if not tokenizer(_PROBE)["input_ids"]:
        raise FpqError(f"The tokenizer in {folder} makes no tokens of a text; copy the model's tokenizer files there.")
    if not path.is_file():
        return
    import tokenizers
    import transformers

    try:
        own = tokenizers.Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
    except Exception as error:  # the library raises nothing else
        raise FpqError(f"{path} is damaged ({str(error).splitlines()[0]}); download it again.") from error
    if own.encode(_PROBE, add_special_tokens=False).ids != tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        raise FpqError(
            f"transformers {transformers.__version__} splits text otherwise than {path} says, so that the model would "
            "read noise; install another version of transformers, or correct tokenizer_config.json."
        )

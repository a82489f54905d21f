"""The command evaluate on Hugging Face folders; what quantize wrote is evaluated in test_quantize."""

import json

import pytest
from conftest import forward

from fpq_jax import load, save
from fpq_jax._pipeline.perplexity import perplexity
from fpq_jax._pipeline.text import evaluation_windows
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.console import run_command
from fpq_jax.evaluate import Options, main
from fpq_jax.quantize import Options as QuantizeOptions
from fpq_jax.quantize import main as quantize


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    run_command(main, Options, "evaluate")


def test_an_unquantized_model(monkeypatch, capsys, tmp_path, tiny_llama, text_file):
    report = tmp_path / "r.json"
    command(
        monkeypatch, "--model", tiny_llama, "--eval", text_file, "--seq-len", 20, "--max-windows", 3, "--report", report
    )
    windows = evaluation_windows(str(text_file), load_tokenizer(tiny_llama), length=20, vocab_size=300)[:3]
    expected = perplexity(forward, load(tiny_llama), windows)
    row = json.loads(report.read_text())["perplexity"][str(text_file)]
    # query, key and value are one product there, whose sums may round otherwise
    assert row == {"original": pytest.approx(expected.value, rel=1e-5), "tokens": expected.tokens}
    assert f"{row['original']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "There is no model folder"),
        (["--eval", "absent.txt"], "There is no text file"),
        (["--seq-len", "1"], "--seq-len is 1"),
        (["--seq-len", "100"], "more than the model's 64"),
        (["--max-windows", "0"], "--max-windows is 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(monkeypatch, capsys, tiny_llama, text_file, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "--model", tiny_llama, "--eval", text_file, *arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_directory_without_a_report_asks_for_texts(monkeypatch, capsys, tmp_path, tiny_llama):
    save(tmp_path / "out", load(tiny_llama))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).write_bytes((tiny_llama / name).read_bytes())
    with pytest.raises(SystemExit):
        command(monkeypatch, "--model", tmp_path / "out")
    assert "name --eval" in capsys.readouterr().err


def test_residencies_give_the_same_and_an_fp8_cache_nearly_so(monkeypatch, tmp_path, tiny_llama, text_file):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("weight: {group_size: 16, constraint: m2}\nmethod: round\n")
    quantize_options = QuantizeOptions(
        model=str(tiny_llama),
        recipe=str(recipe),
        calibration=str(text_file),
        eval=(str(text_file),),
        num_samples=2,
        max_windows=3,
        output=tmp_path / "q",
    )
    quantize(quantize_options)
    reports = {}
    for weights, kv_cache in (("fp8", "model"), ("packed", "model"), ("fp8", "float8")):
        path = tmp_path / f"{weights}-{kv_cache}.json"
        options = ("--weights", weights, "--kv-cache", kv_cache, "--report", path)
        command(monkeypatch, "--model", tmp_path / "q", *options)
        reports[weights, kv_cache] = json.loads(path.read_text())
        assert (reports[weights, kv_cache]["weights"], reports[weights, kv_cache]["kv_cache"]) == (weights, kv_cache)
    value = lambda *which: reports[which]["perplexity"][str(text_file)]["quantized"]
    assert value("fp8", "model") == value("packed", "model")
    assert value("fp8", "float8") != value("fp8", "model")
    assert value("fp8", "float8") == pytest.approx(value("fp8", "model"), rel=0.05)
    assert reports["packed", "model"]["weight_bytes"] < reports["fp8", "model"]["weight_bytes"]

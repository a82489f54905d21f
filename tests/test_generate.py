import json
import re
import shutil

import pytest

from fpq_jax import FpqError, QuantSpec, evaluate, generate, load, quantize_array, save
from fpq_jax._pipeline.tokenizer import load_tokenizer
from fpq_jax._support.console import run_command
from fpq_jax.generate import Options, _stop_tokens, main
from fpq_jax.models.parameters import params_of, with_params


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["generate", *map(str, arguments)])
    run_command(main, Options, "generate")


def test_it_prints_the_text_and_its_speed(monkeypatch, capsys, tiny_llama):
    for extra in ([], ["--temperature", 0.8, "--top-p", 0.9, "--seed", 3], ["--mesh", "data=1,model=1"]):
        command(monkeypatch, "--model", tiny_llama, "--prompt", "the fox [b]", "--max-new-tokens", 9, *extra)
        printed = capsys.readouterr().out
        assert printed.startswith("the fox [b]")
        assert "12 prompt tokens" in printed and "tokens/s" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--model", "/nowhere"], "There is no model folder"),
        (["--prompt", "x" * 100], "at most 63"),
        (["--mesh", "model:2"], "write it as data=4,model=2"),
        (["--mesh", "model=200"], "needs 200 devices"),
    ],
)
def test_wrong_arguments_are_one_sentence(monkeypatch, capsys, tiny_llama, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "--model", tiny_llama, "--prompt", "a", *arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and said in error


def test_stop_tokens_come_from_the_generation_config_first(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    assert _stop_tokens(tiny_llama, tokenizer, 300) == {257}
    (tiny_llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert _stop_tokens(tiny_llama, tokenizer, 300) == {5, 6}
    (tiny_llama / "generation_config.json").unlink()
    (tiny_llama / "config.json").write_text("{}")
    assert _stop_tokens(tiny_llama, tokenizer, 300) == {257}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "does not hold a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; it must be token ids below 300"),
        ('{"eos_token_id": [5, 300]}', "it must be token ids below 300"),
        ("\ufffe{bad", "is not valid JSON"),
    ],
)
def test_a_generation_config_that_is_none_is_said(tiny_llama, content, said):
    (tiny_llama / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(FpqError, match=rf"generation_config\.json.*{re.escape(said)}"):
        main(Options(model=str(tiny_llama), prompt=("a",)))


def test_several_prompts_are_continued_together_and_shown_one_after_the_other(monkeypatch, capsys, tiny_llama):
    options = ["--model", tiny_llama, "--max-new-tokens", 5, "--kv-cache", "float8"]
    command(monkeypatch, *options, "--prompt", "the fox", "a [b] dog runs", "--weights", "packed")
    together = capsys.readouterr().out
    assert together.index("the fox") < together.index("a [b] dog runs")
    assert "23 prompt tokens" in together and "10 new tokens" in together
    # 2 rows of 64 slots, 2 heads of 12 codes and a float32, keys and values of 2 layers
    assert f"{2 * 64 * 2 * (12 + 4) * 2 * 2 / 1024:.1f} KiB of key-value cache" in together
    command(monkeypatch, *options, "--prompt", "the fox")
    alone = capsys.readouterr().out
    assert alone.splitlines()[0] in together


@pytest.mark.full
def test_our_own_kernel_is_said_to_be_unmeasured(monkeypatch, capsys, tiny_llama, tmp_path):
    quantize = lambda w: quantize_array(w, QuantSpec(constraint="m2", group_size=32))
    model = load(tiny_llama)
    params = params_of(model)
    params |= {p: quantize(leaf) for p, leaf in params.items() if p.startswith("layers.") and p.endswith(".kernel")}
    save(tmp_path / "out", with_params(model, params))
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "out")
    said = {}
    for how in ("fp8", "fragments"):
        command(
            monkeypatch, "--model", tmp_path / "out", "--weights", how, "--max-new-tokens", 5, "--prompt", "the fox"
        )
        said[how] = capsys.readouterr().out
    assert said["fragments"].startswith(
        "weights fragments: the kernel is compiled and checked for Hopper but not yet measured"
    )
    assert said["fp8"].splitlines()[0] == said["fragments"].splitlines()[1]
    for module, more in ((generate, ["--prompt", "a"]), (evaluate, ["--eval", "demo"])):
        monkeypatch.setattr("sys.argv", ["fpq", "--model", str(tiny_llama), "--weights", "fragments", *more])
        with pytest.raises(SystemExit):
            run_command(module.main, module.Options, "fpq")
        printed = capsys.readouterr()
        assert "No weight here is for the kernel" in printed.err and not printed.out

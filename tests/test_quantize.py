"""The command quantize, end to end on a random LLaMA; evaluate and generate on what it wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fpq_jax import Generator, QTensor, evaluate, load
from fpq_jax._support.console import run_command
from fpq_jax.models.parameters import params_of
from fpq_jax.quantize import Options, main


def command(monkeypatch, *arguments):
    """Run in this process as the command line would; the tiny models' scales take more bits than the default allows."""
    if "--recipe" not in arguments:
        arguments += ("--recipe", "w4a8-fp-m2-lorc")
    monkeypatch.setattr("sys.argv", ["quantize", *map(str, arguments)])
    run_command(main, Options, "quantize")


def refused(monkeypatch, capsys, *arguments):
    """The one sentence that a refused command prints."""
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert "layers.0" not in captured.out, "refused after work had begun"
    return captured.err


def test_a_run_leaves_all_that_the_other_commands_need(monkeypatch, capsys, tmp_path, tiny_llama, text_file):
    out, report_file = tmp_path / "out", tmp_path / "report.json"
    command(
        monkeypatch, "--model", tiny_llama, "--calibration", text_file, "--num-samples", 9, "--seq-len", 32,
        "--group-size", 32, "--max-windows", 5, "--output", out, "--report", report_file, "--seed", 7,
    )  # fmt: skip
    printed = capsys.readouterr().out
    report = json.loads(report_file.read_text())
    assert report == json.loads((out / "report.json").read_text())
    tail = f"{text_file} (held-back tail)"
    assert report["version"] == 1 and report["seed"] == 7 and report["model"] == str(tiny_llama)
    assert report["recipe"]["weight"]["group_size"] == 32 and report["recipe"]["name"] == "w4a8-fp-m2-lorc"
    assert report["perplexity"][tail]["tokens"] == 5 * 31
    assert len(report["layers"]) == 14
    for row in report["layers"]:
        assert row["error"] < row["rounding_error"] and row["damping"] == 0.01 and row["seconds"] >= 0
        assert row["name"] in printed
    assert set(report) >= {"calibration", "bytes", "seconds", "peak_memory_bytes", "devices", "versions"}
    assert report["bytes"]["quantized"] < report["bytes"]["original"]
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == report["recipe"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes()
    assert f"evaluate --model {out}" in printed

    quantized = [leaf for leaf in params_of(load(out)).values() if isinstance(leaf, QTensor)]
    bits = 8 * sum(q.nbytes for q in quantized) / sum(q.size for q in quantized)
    assert report["bits_per_weight"] == pytest.approx(bits)

    # new processes, from another folder
    def fresh(module, *arguments):
        line = [sys.executable, "-m", f"fpq_jax.{module}", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    evaluated = fresh("evaluate", "--model", "out", "--report", "evaluated.json")
    row = json.loads((tmp_path / "evaluated.json").read_text())["perplexity"][tail]
    assert row == {"quantized": report["perplexity"][tail]["quantized"], "tokens": 5 * 31}
    assert f"{row['quantized']:.4f}" in evaluated and f"{row['quantized']:.4f}" in printed
    generated = fresh("generate", "--model", "out", "--prompt", "the quick", "--max-new-tokens", "4")
    assert generated.startswith("the quick") and "4 new tokens" in generated


@pytest.mark.full
def test_an_opt_goes_through_every_command_and_keeps_its_embeddings_once(
    monkeypatch, capsys, tmp_path, tiny_opt, text_file
):
    out = tmp_path / "out"
    command(monkeypatch, "--model", tiny_opt, "--calibration", text_file, "--num-samples", 9, "--seq-len", 32,
            "--group-size", 32, "--max-windows", 5, "--output", out)  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["layers"][:2]] == ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"]
    assert all(row["error"] < row["rounding_error"] for row in report["layers"]) and len(report["layers"]) == 12
    parts = json.loads((out / "fpq.json").read_text())["parts"].values()
    arrays = {path: leaf for part in parts for path, leaf in part["arrays"].items()}
    shapes = [tuple(a["shape"]) for parts in arrays.values() for a in parts.values()]
    assert shapes.count((300, 48)) == 1 and (48, 300) not in shapes and not any("lm_head" in path for path in arrays)
    model = load(out)
    assert model.lm_head is None

    fresh = lambda *line: subprocess.run([sys.executable, "-m", *line], cwd=tmp_path, check=True, capture_output=True)
    fresh("fpq_jax.evaluate", "--model", "out", "--report", "evaluated.json")
    ((spec, row),) = json.loads((tmp_path / "evaluated.json").read_text())["perplexity"].items()
    assert row["quantized"] == report["perplexity"][spec]["quantized"]
    printed = fresh("fpq_jax.generate", "--model", "out", "--prompt", "the quick", "--max-new-tokens", "4").stdout
    assert printed.startswith(b"the quick") and b"4 new tokens" in printed


VARIANTS = {
    "static": "{activation_scale: static, weight: {constraint: m2, group_size: 16, compute_rows: 8}, "
    "lorc: {rank: auto, dtype: int8}}",
    "static-int": "{activation: int8-asym, activation_scale: static, weight: {format: int8, group_size: channel}}",
    "e5m2": "{activation: e5m2, weight: {format: e5m2, group_size: channel}}",
    "qtorch": "{activation: e4m3-qtorch, weight: {format: e2m1-qtorch, group_size: 16}}",
    "int4-activations": "{activation: int4, weight: {format: int4, group_size: 16, constraint: m1}, method: round}",
}


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_the_papers_variants_are_kept_and_evaluated_alike(monkeypatch, capsys, tmp_path, tiny_opt, text_file, name):
    recipe, out = tmp_path / f"{name}.yaml", tmp_path / "out"
    recipe.write_text(VARIANTS[name])
    command(monkeypatch, "--model", tiny_opt, "--recipe", recipe, "--calibration", text_file, "--num-samples", 4,
            "--max-windows", 2, "--output", out)  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    ((spec, row),) = report["perplexity"].items()
    assert row["quantized"] != row["original"] and row["quantized"] < 3 * row["original"]
    monkeypatch.setattr("sys.argv", ["evaluate", "--model", str(out), "--report", str(tmp_path / "again.json")])
    run_command(evaluate.main, evaluate.Options, "evaluate")
    again = json.loads((tmp_path / "again.json").read_text())["perplexity"][spec]["quantized"]
    assert again == row["quantized"]
    q = params_of(load(out))["layers.1.fc2.kernel"]
    assert (q.input_scale is None) == ("static" not in name)
    if name == "static":
        assert report["recipe"]["lorc"]["dtype"] == "int8" and q.low_rank.a.dtype == "int8"
        assert len(set(q.row_scale.ravel()[:8].tolist())) == 1


@pytest.mark.full
@pytest.mark.parametrize("name", ["w8a8-fp", "w8a8-int", "w4a16-fp", "w4a8-e3m0", "w4a8-int-fp-lorc"])
def test_recipes_and_named_evaluations(monkeypatch, capsys, tmp_path, tiny_llama, text_file, name):
    report_file = tmp_path / "report.json"
    command(
        monkeypatch, "--model", tiny_llama, "--recipe", name, "--calibration", text_file, "--num-samples", 4,
        "--eval", text_file, "demo", "--max-windows", 2, "--report", report_file, "--dtype", "bfloat16",
    )  # fmt: skip
    report = json.loads(report_file.read_text())
    assert list(report["perplexity"]) == [str(text_file), "demo"] and report["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "measured and not kept" in printed
    # groups of 256 are whole rows here
    assert ("multiply in bfloat16" in printed) == (name == "w4a8-int-fp-lorc")


@pytest.mark.full
def test_a_group_that_does_not_fit_a_row_has_no_fp8_form_and_that_is_said(monkeypatch, capsys, tiny_llama, text_file):
    command(monkeypatch, "--model", tiny_llama, "--recipe", "w4a8-fp", "--group-size", 32, "--calibration", text_file,
            "--num-samples", 4, "--max-windows", 2)  # fmt: skip
    assert "no FP8 form" in capsys.readouterr().out


@pytest.mark.full
def test_too_many_linears_without_gptq_end_with_status_1(monkeypatch, capsys, tmp_path, tiny_llama, text_file):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= 0
    save_file(tensors, tiny_llama / "model.safetensors")
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "--model", tiny_llama, "--calibration", text_file, "--num-samples", 4, "--max-windows", 2,
                "--report", tmp_path / "r.json")  # fmt: skip
    assert exit_.value.code == 1
    assert "GPTQ could not run for 4 of 14 Linears" in capsys.readouterr().out
    notes = [row["notes"] for row in json.loads((tmp_path / "r.json").read_text())["layers"] if "notes" in row]
    assert len(notes) == 4 and "all zero during calibration" in notes[0][0]


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "missing":
        weights.unlink()
    elif how == "tensors":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, weights)
    elif how in ("nan", "inf"):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float(how)
        save_file(tensors, weights)
    elif how == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    elif how == "tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", ["model.safetensors is truncated"]),
        ("missing", ["lacks model.safetensors"]),
        ("tensors", ["missing: model.layers.1.mlp.up_proj.weight", "unexpected: model.layers.9.mlp.up_proj.weight"]),
        ("nan", ["model.layers.1.mlp.up_proj.weight", "NaN"]),
        ("inf", ["model.layers.1.mlp.up_proj.weight", "infinite"]),
        ("architecture", ["'bert' is not supported"]),
        ("tokenizer", ["No tokenizer can be loaded"]),
    ],
)
def test_a_damaged_model_is_one_sentence(monkeypatch, capsys, tmp_path, tiny_llama, text_file, how, said):
    damage(tiny_llama, how)
    error = refused(
        monkeypatch, capsys, "--model", tiny_llama, "--calibration", text_file, "--output", tmp_path / "out"
    )
    assert all(part in error for part in said), error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "There is no model folder /nowhere"),
        (["--recipe", "w4a8-fp-m2-lorq"], "did you mean w4a8-fp-m2-lorc"),
        (["--group-size", "0"], "group_size is 0"),
        (["--calibration", "absent.txt"], "There is no text file absent.txt"),
        (["--eval", "wikitext3"], "'wikitext3' is no text"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--seq-len", "1"], "--seq-len is 1"),
        (["--seq-len", "65"], "more than the model's 64 positions"),
        (["--max-windows", "0"], "--max-windows is 0"),
        (["--report", "nowhere/report.json"], "nowhere/report.json cannot be written"),
        (["--output", "SHORT"], "not empty"),
        (["--calibration", "SHORT/short.txt"], "less than one window"),
    ],
)
def test_wrong_arguments_are_one_sentence(monkeypatch, capsys, tmp_path, tiny_llama, text_file, arguments, said):
    short = tmp_path / "short"
    short.mkdir()
    (short / "short.txt").write_text("too short")
    arguments = [a.replace("SHORT", str(short)) for a in arguments]
    error = refused(monkeypatch, capsys, "--model", tiny_llama, "--calibration", text_file, *arguments)
    assert said in error
    assert sorted(p.name for p in short.iterdir()) == ["short.txt"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        ({"scale_embeddings": True}, "scale_embeddings is not supported"),
        ({"ffn_dim": 96}, "fc1.weight [80, 48] instead of [96, 48]"),
    ],
)
def test_an_opt_that_is_not_supported_is_one_sentence(monkeypatch, capsys, tiny_opt, text_file, change, said):
    config = json.loads((tiny_opt / "config.json").read_text())
    (tiny_opt / "config.json").write_text(json.dumps({**config, **change}))
    assert said in refused(monkeypatch, capsys, "--model", tiny_opt, "--calibration", text_file)


def test_a_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch, capsys, tiny_llama):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "c4 cannot be fetched" in refused(monkeypatch, capsys, "--model", tiny_llama)


def test_a_quantized_directory_is_not_quantized_again(monkeypatch, capsys, tmp_path, tiny_llama, text_file):
    (tiny_llama / "fpq.json").write_text("{}")
    error = refused(monkeypatch, capsys, "--model", tiny_llama, "--calibration", text_file)
    assert "already quantized" in error


@pytest.mark.full
def test_a_killed_run_leaves_no_directory_of_that_name(tmp_path, tiny_llama, text_file):
    """Killed while it works: --output must not exist, and the same command then succeeds."""
    line = [sys.executable, "-m", "fpq_jax.quantize", "--model", tiny_llama, "--calibration", text_file,
            "--recipe", "w4a8-fp-m2-lorc", "--num-samples", "4", "--output", tmp_path / "out"]  # fmt: skip
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as run:
        for printed in run.stdout:
            if "model.layers.0" in printed:
                break
        run.kill()
    assert not (tmp_path / "out").exists()
    subprocess.run(line, check=True, capture_output=True)
    assert isinstance(params_of(load(tmp_path / "out"))["layers.0.mlp.up_proj.kernel"], QTensor)


@pytest.mark.full
def test_a_checkpoint_in_float16_is_worked_on_in_float32_on_a_cpu(monkeypatch, capsys, tmp_path, tiny_opt, text_file):
    weights = tiny_opt / "model.safetensors"
    save_file({name: tensor.astype("float16") for name, tensor in load_file(weights).items()}, weights)
    command(monkeypatch, "--model", tiny_opt, "--calibration", text_file, "--num-samples", 4, "--max-windows", 2,
            "--group-size", 16, "--output", tmp_path / "out")  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dtype"] == "float32"
    monkeypatch.setattr(
        "sys.argv", ["evaluate", "--model", str(tiny_opt), "--eval", str(text_file), "--max-windows", "2"]
    )
    run_command(evaluate.main, evaluate.Options, "evaluate")
    assert str(load(tiny_opt).embed_tokens.embedding.get_value().dtype) == "float16"
    assert len(Generator(load(tiny_opt, weights="fp8"))([[1, 2]], max_new_tokens=3).tokens[0]) == 3


@pytest.mark.full
def test_a_run_that_is_terminated_leaves_no_temporary_folder(tmp_path, tiny_llama, text_file):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    line = [sys.executable, "-m", "fpq_jax.quantize", "--model", tiny_llama, "--calibration", text_file]
    line += ["--recipe", "w4a8-fp-m2-lorc"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    run = subprocess.Popen(list(map(str, line)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list(temporary.glob("fpq-*")):
        assert run.poll() is None
        time.sleep(0.02)
    run.terminate()
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and b"Interrupted" in printed and b"Traceback" not in printed
    assert not list(temporary.glob("fpq-*"))

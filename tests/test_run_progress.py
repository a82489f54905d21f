"""Runs that die: killed at random moments, out of disk, interrupted, with damaged progress; then the same command."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint
from jax.experimental.compilation_cache import compilation_cache

from fpq_jax import FpqError, QTensor, load, quantize
from fpq_jax._checkpoints.run_progress import RunProgress
from fpq_jax._support.compile_cache import kept_programs
from fpq_jax.models.parameters import params_of

LAYERS = 4
KILLS = 10


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model of four layers, a text, and what an undisturbed run made of them."""
    folder = tmp_path_factory.mktemp("resume")
    config = {**TINY_CONFIG, "num_hidden_layers": LAYERS}
    write_checkpoint(folder / "model", config, random_tensors(config))
    rng = random.Random(0)
    (folder / "text.txt").write_text(" ".join(rng.choices("a quick brown fox jumps over lazy dogs".split(), k=1500)))
    quantize.main(options(folder, "undisturbed"))
    return folder


def options(folder: Path, output: str, **changes) -> quantize.Options:
    given = {"model": str(folder / "model"), "calibration": str(folder / "text.txt"), "num_samples": 9,
             "recipe": "w4a8-fp-m2-lorc", "group_size": 16, "max_windows": 4, "output": folder / output}  # fmt: skip
    return quantize.Options(**(given | changes))


def assert_same_bits(folder: Path, output: str, undisturbed: str = "undisturbed") -> None:
    """As the undisturbed run's, array by array, and the report but for what is measured of the machine."""
    expected, got = (params_of(load(folder / name)) for name in (undisturbed, output))
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    expected, got = (json.loads((folder / name / "report.json").read_text()) for name in (undisturbed, output))
    assert expected["perplexity"] == got["perplexity"] and expected["bytes"] == got["bytes"]
    rows = [[{**row, "seconds": 0} for row in report["layers"]] for report in (expected, got)]
    assert rows[0] == rows[1]
    assert not (folder / f"{output}.unfinished").exists()


def _run(given: quantize.Options, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        quantize.main(given)


@pytest.mark.full
def test_killed_at_ten_random_moments(work):
    processes = multiprocessing.get_context("forkserver")  # what is imported is there when a run begins
    processes.set_forkserver_preload(["fpq_jax.quantize", "orbax.checkpoint", "transformers", "datasets"])
    rng, log = random.Random(0), work / "log.txt"

    def start(output: str):
        process = processes.Process(target=_run, args=(options(work, output, recipe="w4a8-fp-m2"), str(log)))
        process.start()
        return process

    for output in ("cold", "warm"):  # the second one finds the programs compiled, as those to come will
        began = time.monotonic()
        process = start(output)
        process.join()
        assert process.exitcode == 0, log.read_text()
        longest = time.monotonic() - began
        assert_same_bits(work, output, "cold")
    kills, runs, finished_at_kill = 0, 0, []
    while kills < KILLS:
        output = f"run{runs}"
        runs += 1

        def finished_layers() -> int:
            return len(list((work / f"{output}.unfinished").glob("progress/layers.*.json")))  # noqa: B023

        for behind in sorted(rng.sample(range(LAYERS + 1), 3)):
            if kills == KILLS or (work / output).exists():
                break
            process = start(output)
            while process.is_alive() and finished_layers() < behind:  # a layer, not a time: machines differ in pace
                time.sleep(0.002)
            process.join(rng.uniform(0, longest / (100 if behind else 2)))
            if process.is_alive():
                process.kill()
                process.join()
                if process.exitcode == 0:  # it ended in the moment between
                    continue
                kills += 1
                assert process.exitcode == -signal.SIGKILL
                finished_at_kill.append(finished_layers())
            else:
                assert process.exitcode == 0, log.read_text()
        if not (work / output).exists():
            process = start(output)
            process.join()
            assert process.exitcode == 0, log.read_text()
        assert_same_bits(work, output, "cold")
    assert len(set(finished_at_kill)) > 1, f"every kill came at the same point: {finished_at_kill}"


@pytest.fixture
def half_done(work):
    """The progress of a run that was stopped behind its second layer."""
    shutil.rmtree(work / "half.unfinished", ignore_errors=True)
    stop = RunProgress.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def write(self, name, params, **told):
            if name == "layers.2":
                raise KeyboardInterrupt
            stop(self, name, params, **told)

        patch.setattr(RunProgress, "write", write)
        quantize.main(options(work, "half"))
    yield work / "half.unfinished"
    shutil.rmtree(work / "half", ignore_errors=True)


def layers_solved(monkeypatch) -> list:
    """Will hold the Linears of each layer that is quantized again."""
    import fpq_jax._pipeline.quantize_layers as pipeline

    solved, original = [], pipeline.quantize_linears
    monkeypatch.setattr(pipeline, "quantize_linears", lambda w, t, names, *a: (
        solved.append(next(iter(names.values())).split(".")[2]), original(w, t, names, *a))[1])  # fmt: skip
    return solved


def test_ctrl_c_ends_with_a_sentence_and_the_command_goes_on(work, half_done, monkeypatch, capsys):
    import fpq_jax._pipeline.run as run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_quantized", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(
            KeyboardInterrupt,
            match=f"goes on behind {LAYERS} finished layers, which are kept in .*half.unfinished",
        ):
            solved = layers_solved(patch)
            quantize.main(options(work, "half"))
    assert solved == ["2", "3"]
    again = layers_solved(monkeypatch)
    quantize.main(options(work, "half"))
    assert again == []
    assert "6 of 6 parts are there already" in capsys.readouterr().out
    assert_same_bits(work, "half")


@pytest.mark.full
def test_memory_that_runs_out_is_said_and_loses_nothing(work, half_done, monkeypatch):
    import fpq_jax._pipeline.quantize_layers as pipeline

    def no_room(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quantize_linears", no_room)
        with pytest.raises(
            FpqError, match=r"not enough memory \(RESOURCE_EXHAUSTED.*7 bytes.\); .*behind 2 finished layers"
        ):
            quantize.main(options(work, "half"))
    solved = layers_solved(monkeypatch)
    quantize.main(options(work, "half"))
    assert solved == ["2", "3"]
    assert_same_bits(work, "half")


@pytest.mark.full
def test_a_full_disk_is_said_and_when_there_is_room_the_command_goes_on(work, tmp_path):
    """On a tmpfs that the first run fills; where none may be mounted, files that may not be longer than so much."""
    code = (
        "import sys; from pathlib import Path; from fpq_jax import quantize; "
        "from fpq_jax._pipeline import estimate; "
        "estimate.free_disk = lambda place: 2**40; from fpq_jax._support.console import run_command; "
        "sys.argv = sys.argv[1:]; run_command(quantize.main, quantize.Options, 'quantize')"
    )
    line = [sys.executable, "-c", code, "quantize", "--model", work / "model", "--calibration", work / "text.txt",
            "--recipe", "w4a8-fp-m2-lorc", "--num-samples", "9", "--group-size", "16", "--max-windows", "4",
            "--output", "disk/full"]  # fmt: skip
    script = (
        'cd "$0" && mkdir -p disk && mount -t tmpfs -o size=350k tmpfs disk || exit 77; "$@"; first=$?; '
        "ls disk/full.unfinished/progress; mount -o remount,size=20m disk || exit 77; "
        '[ $first = 2 ] && "$@" && cp -r disk/full .'
    )
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        whole = [*unshare, "sh", "-c", script, tmp_path, *line]
        done = subprocess.run(list(map(str, whole)), capture_output=True, text=True, check=False)
        if done.returncode != 77 and "unshare failed" not in done.stderr:
            break
    else:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and "make room there" in errors[0] and "Traceback" not in done.stderr, done.stderr
    assert "layers.0.json" in done.stdout and "parts are there already" in done.stdout
    (tmp_path / "full").rename(work / "full")
    assert_same_bits(work, "full")


@pytest.mark.full
def test_every_progress_file_damaged_in_turn(work, half_done, monkeypatch):
    """Each file, cut short, changed in one byte, and gone: found out, and only its part made again."""
    intact = work / "intact"
    shutil.rmtree(intact, ignore_errors=True)
    shutil.copytree(half_done, intact)
    facts = json.loads((half_done / "job.json").read_text())["value"]
    files = sorted(path.relative_to(intact) for path in intact.rglob("*") if path.is_file())
    assert len([f for f in files if f.parts[0] == "progress"]) == 5 and len(files) > 20
    for file in files:
        for damage in ("cut", "changed", "gone"):
            shutil.rmtree(half_done)
            shutil.copytree(intact, half_done)
            whole = (half_done / file).read_bytes()
            if damage == "gone":
                (half_done / file).unlink()
            elif damage == "cut":
                (half_done / file).write_bytes(whole[: len(whole) // 2])
            else:
                at = len(whole) // 2
                (half_done / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            store = RunProgress(work / "half", facts)
            store.close()
            lost = {"embedding", "layers.0", "layers.1"} - set(store.parts)
            part = file.stem if file.parts[0] == "progress" else file.parts[2] if file.parts[0] == "model" else None
            assert lost == ({part} - {"original", "programs", None}), (file, damage)
            assert (store.measured("original") is None) == (part == "original")
    # with several of them at once the result is what it would have been
    shutil.rmtree(half_done)
    shutil.copytree(intact, half_done)
    for name in ("job.json", "progress/layers.0.json"):
        (half_done / name).write_text((half_done / name).read_text()[:-30])
    next((half_done / "model/params/embedding").rglob("manifest.ocdbt")).write_bytes(b"")
    solved = layers_solved(monkeypatch)
    quantize.main(options(work, "half"))
    assert solved == ["0", "2", "3"]
    assert_same_bits(work, "half")


def test_programs_are_kept_with_the_progress(tmp_path):
    """On a GPU another compilation may choose other algorithms, and so other bits."""
    told = jax.config.jax_compilation_cache_dir
    with kept_programs(tmp_path / "elsewhere"):
        assert jax.config.jax_compilation_cache_dir == told  # a person's own choice stays
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with kept_programs(tmp_path / "programs"):
            jax.jit(lambda x: x * 3 + 1)(np.arange(5.0)).block_until_ready()
        assert len(list((tmp_path / "programs").iterdir())) >= 1
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", told)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"seed": 1}, "calibration, seed"),
        ({"recipe": "w4a8-fp"}, "recipe"),
        ({"group_size": 8}, "recipe"),
        ({"num_samples": 8}, "calibration"),
        ({"max_windows": 3}, "evaluation"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"batch_tokens": 64}, "batch_tokens"),
    ],
)
def test_another_job_is_refused_and_told_what_differs(work, half_done, changes, differs):
    with pytest.raises(FpqError, match=rf"another job \({differs} differ\)"):
        quantize.main(options(work, "half", **changes))
    assert (half_done / "progress" / "layers.1.json").is_file()


@pytest.mark.full
def test_another_model_version_or_tokenizer_is_refused(work, half_done, tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(work / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"added": 1,', 1))
    monkeypatch.setattr("fpq_jax._pipeline.job.code_digest", lambda: "another")
    with pytest.raises(FpqError, match=r"another job \(model, tokenizer, version differ\)"):
        quantize.main(options(work, "half", model=str(tmp_path / "model")))


def test_two_runs_of_one_job_at_once_are_refused(work, half_done):
    facts = json.loads((half_done / "job.json").read_text())["value"]
    first = RunProgress(work / "half", facts)
    with pytest.raises(FpqError, match="Another process is working on"):
        quantize.main(options(work, "half"))
    first.close()
    RunProgress(work / "half", facts).close()


def test_an_unfinished_run_is_no_model(work, half_done):
    with pytest.raises(FpqError, match="half is not finished; start its quantize command again"):
        load(work / "half")
    for place in (half_done, half_done / "model"):
        with pytest.raises(FpqError, match="is an unfinished run; start its quantize command again"):
            load(place)
        for command in (["evaluate"], ["generate", "--prompt", "a"]):
            line = [sys.executable, "-m", f"fpq_jax.{command[0]}", "--model", place, *command[1:]]
            if place == half_done:
                done = subprocess.run(line, capture_output=True, text=True, check=False)
                assert done.returncode == 2 and "is an unfinished run" in done.stderr


def test_a_folder_of_that_name_with_other_things_in_it_is_left_alone(work):
    (work / "other.unfinished").mkdir(exist_ok=True)
    (work / "other.unfinished" / "thesis.tex").write_text("years of work")
    with pytest.raises(FpqError, match="is no progress of a run"):
        quantize.main(options(work, "other"))
    assert (work / "other.unfinished" / "thesis.tex").read_text() == "years of work"


@pytest.mark.full
def test_a_run_killed_when_its_model_was_in_its_place_is_finished_by_the_same_command(work, half_done, capsys):
    facts = (half_done / "job.json").read_text()
    for changes, said in (({}, None), ({"seed": 1}, "exists and is not empty")):
        shutil.copytree(work / "undisturbed", work / "placed", dirs_exist_ok=True)
        (work / "placed.unfinished" / "progress").mkdir(parents=True)
        (work / "placed.unfinished" / "job.json").write_text(facts)
        given = options(work, "placed", report=work / "placed.json", **changes)
        if said is None:
            quantize.main(given)
            assert "was finished already" in capsys.readouterr().out
            assert json.loads((work / "placed.json").read_text())["layers"]
        else:
            with pytest.raises(FpqError, match=said):
                quantize.main(given)
        assert not (work / "placed.unfinished").exists()
    assert isinstance(params_of(load(work / "placed"))["layers.0.mlp.up_proj.kernel"], QTensor)


@pytest.mark.full
def test_before_anything_is_finished_other_options_may_be_used(work, tmp_path):
    """What a refusal advises can be done; an output that is a link to an empty folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FpqError, match="too little"):
        patch.setattr(quantize, "check_estimate", lambda *a: (_ for _ in ()).throw(FpqError("too little")))
        quantize.main(replace(options(work, "x", num_samples=10), output=tmp_path / "link"))
    assert (tmp_path / "folder.unfinished" / "job.json").is_file()
    quantize.main(replace(options(work, "x"), output=tmp_path / "link"))
    (tmp_path / "folder").rename(work / "linked")
    assert_same_bits(work, "linked")

"""The commands on several devices and in several processes give what one device gives."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

from fpq_jax import QTensor, load, unpack
from fpq_jax.models.parameters import params_of

pytestmark = pytest.mark.full

ALL_COMMANDS = """
import json, sys
from fpq_jax import evaluate, generate, quantize
from fpq_jax._support.console import run_command
for name, arguments in json.loads(sys.argv[1]):
    command = {"quantize": quantize, "evaluate": evaluate, "generate": generate}[name]
    sys.argv = [name, *arguments]
    run_command(command.main, command.Options, name)
"""
# every kind of thing that several devices do: LoRC, static scales, a scale for a whole tensor, a Linear left as it is
RECIPE = """
{weight: {constraint: m2, group_size: 16}, lorc: {rank: 4}, rules: [
  {match: "*.down_proj", activation_scale: static},
  {match: "model.layers.1.self_attn.k_proj", quantize: false},
  {match: "model.layers.0.self_attn.o_proj", weight: {format: e4m3, group_size: tensor, constraint: null}}]}
"""
# and what goes beyond the paper, beside the unquantized model and with its gradients
JOINT = """
{weight: {constraint: m2, group_size: 16}, order: activation, scale_search: true, sweeps: 1, fisher: 0.2,
 sequential: true, error_propagation: 0.5, lorc: {rank: 4, weighted: true, rounds: 1}}
"""
PROMPTS = ["the quick", "a lazy dog", "fields"]


def commands(work: Path, output: str, *more: str) -> list:
    """Quantize into ``output``, evaluate and generate with it."""
    text = str(work / "text.txt")
    quantized = ["--model", str(work / output)]
    given = ["--model", str(work / "model"), "--calibration", text, "--num-samples", "13",
             "--max-windows", "5", "--recipe", str(work / "r.yaml"), "--output", str(work / output)]  # fmt: skip
    return [
        ("quantize", [*given, *more]),
        ("evaluate", [*quantized, "--report", str(work / f"{output}.json"), *more]),
        ("generate", [*quantized, "--prompt", *PROMPTS, "--max-new-tokens", "8", *more]),
    ]


def start(work: Path, todo: list, devices: int = 1, **environment: str) -> subprocess.Popen:
    # optimizing the programs takes longer than running them
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    line = [sys.executable, "-c", ALL_COMMANDS, json.dumps(todo)]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
    )  # fmt: skip


def start_two(work: Path, todo: list, devices: int = 1) -> list[subprocess.Popen]:
    """The same in two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    them = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(work, todo, devices, **them, JAX_PROCESS_ID=str(i)) for i in range(2)]


def printed(*processes: subprocess.Popen) -> list[str]:
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    # Gloo, which carries the CPU's collectives, prints from C++
    return ["".join(row for row in out.splitlines(True) if not row.startswith("[Gloo]")) for out, _ in outputs]


def generated(out: str) -> str:
    """What generate printed, without its speed."""
    return out[out.index(PROMPTS[0]) :].rpartition("\n\n")[0].rpartition("prompt tokens")[0].rpartition("\n")[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, a text, and what one device makes of them: out of quantize, evaluate and generate."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "r.yaml").write_text(RECIPE)
    write_checkpoint(folder / "model", TINY_CONFIG, random_tensors(TINY_CONFIG))
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(rng.choice("a quick brown fox jumps over lazy dogs".split(), 1500)))
    (out,) = printed(start(folder, commands(folder, "one")))
    (folder / "one.txt").write_text(out)
    return folder


def assert_as_one_device(work: Path, output: str, out: str) -> None:
    """At least 99.9 % of the codes, perplexity to 4 digits by both commands, and the generated text."""
    expected, got = (params_of(load(work / name)) for name in ("one", output))
    same = total = 0
    for path, leaf in expected.items():
        if isinstance(leaf, QTensor):
            codes = lambda q: np.asarray(unpack(q.codes, q.shape[0]) if q.spec.format.packed else q.codes)
            a, b = codes(leaf), codes(got[path])
            same, total = same + (a == b).sum(), total + a.size
            if leaf.low_rank is not None:  # the corrections are there, and the same ones
                a, b = (np.asarray(q.low_rank.product()) for q in (leaf, got[path]))
                assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a) > 0, path
    assert same >= 0.999 * total, same / total
    rows = [json.loads((work / name / "report.json").read_text())["layers"] for name in ("one", output)]
    for row, other in zip(*rows, strict=True):
        assert row["name"] == other["name"] and row["error"] < row["rounding_error"]
        assert other["error"] == pytest.approx(row["error"], rel=0.02)
    for read in (lambda name: work / name / "report.json", lambda name: work / f"{name}.json"):
        rows = [json.loads(read(name).read_text())["perplexity"] for name in ("one", output)]
        for spec, row in rows[0].items():
            assert row["tokens"] == rows[1][spec]["tokens"]
            assert row["quantized"] == pytest.approx(rows[1][spec]["quantized"], rel=1e-4)
    assert generated(out) == generated((work / "one.txt").read_text())


def test_eight_devices_of_one_process(work):
    mesh = ("--mesh", "data=4,model=2")
    (out,) = printed(start(work, commands(work, "eight", *mesh), devices=8))
    assert_as_one_device(work, "eight", out)
    report = json.loads((work / "eight" / "report.json").read_text())
    assert report["mesh"] == {"data": 4, "model": 2} and len(report["devices"]) == 8
    # restored onto one device by assert_as_one_device; and what one device wrote onto eight
    todo = [("generate", ["--model", str(work / "one"), "--prompt", *PROMPTS, "--max-new-tokens", "8", *mesh])]
    (out,) = printed(start(work, todo, devices=8))
    assert generated(out) == generated((work / "one.txt").read_text())


def test_eight_devices_quantize_as_well_as_one_stage_by_stage(work):
    """A sum in another order turns a tie, and all that is behind it becomes other codes, which are as good."""
    (work / "j.yaml").write_text(JOINT)
    for name, devices in (("joint-one", 1), ("joint-eight", 8)):
        (quantize, *_) = commands(work, name, "--mesh", f"data={devices}")
        quantize[1][quantize[1].index(str(work / "r.yaml"))] = str(work / "j.yaml")
        printed(start(work, [quantize], devices=devices))
    one, eight = (json.loads((work / f"joint-{name}" / "report.json").read_text()) for name in ("one", "eight"))
    for row, other in zip(one["layers"], eight["layers"], strict=True):
        assert row["name"] == other["name"] and row["error"] < row["rounding_error"]
        assert other["error"] == pytest.approx(row["error"], rel=0.25)
    total = lambda report: sum(row["error"] for row in report["layers"])
    assert total(eight) == pytest.approx(total(one), rel=0.05)
    for spec, row in one["perplexity"].items():
        assert eight["perplexity"][spec]["original"] == pytest.approx(row["original"], rel=1e-5)
        assert eight["perplexity"][spec]["quantized"] == pytest.approx(row["quantized"], rel=0.01)


def test_two_processes_killed_and_started_again(work):
    """Killed when the first layer is there, both of them; the second process prints nothing."""
    todo = commands(work, "two", "--distributed")
    progress = work / "two.unfinished" / "progress"
    killed = start_two(work, todo)
    while all(process.poll() is None for process in killed) and not (progress / "layers.0.json").exists():
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.communicate()
    if (work / "two").exists():
        pytest.fail("the run was over before it could be killed")
    out, silent = printed(*start_two(work, todo))
    assert "parts are there already" in out and silent == ""
    assert_as_one_device(work, "two", out)
    report = json.loads((work / "two" / "report.json").read_text())
    assert report["mesh"] == {"data": 2, "model": 1} and report["devices"] == ["cpu", "cpu"]
    leaves = jax.tree.leaves(params_of(load(work / "two")))
    assert len(leaves) == len(jax.tree.leaves(params_of(load(work / "one"))))


def test_processes_that_cannot_be_joined_are_said(work):
    process = start(work, commands(work, "none", "--distributed"), JAX_PROCESS_ID="first")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "JAX_PROCESS_ID is 'first'; it must be a number" in errors
    process = start(work, commands(work, "none", "--distributed"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "set JAX_COORDINATOR_ADDRESS" in errors and "Traceback" not in errors

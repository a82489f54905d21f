"""Peak memory of whole runs, in fresh processes: flat in the number of layers, and below the checkpoint's own size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY_CONFIG, write_tokenizer
from safetensors.numpy import save_file

from fpq_jax import QuantSpec, quantize_array, save
from fpq_jax.models.parameters import abstract_model, params_of, part_of, to_hf_tensors, with_params
from fpq_jax.models.registry import model_class_of

pytestmark = pytest.mark.full

MB = 10**6
# of threads' own arenas, and of what was freed, glibc keeps more than is used: noise here, and a limit counts it
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}


def write_random_model(folder: Path, layers: int, hidden: int, inner: int) -> int:
    """A float32 LLaMA in a shard for each part, all layers of the same random values; its bytes."""
    config = {**TINY_CONFIG, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
              "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    rng = np.random.default_rng(0)
    model_class = model_class_of(config)
    drawn, parts = {}, {}
    for path, leaf in params_of(abstract_model(model_class, model_class.Config.from_hf(config))).items():
        kind = path.split(".", 2)[-1]
        if kind not in drawn:
            drawn[kind] = rng.standard_normal(leaf.shape, np.float32) * 0.05 + (leaf.ndim == 1)
        parts.setdefault(part_of(model_class, path), {})[path] = drawn[kind]
    weight_map = {}
    for name, params in parts.items():
        tensors = to_hf_tensors(model_class, params)
        save_file(tensors, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_recipe(folder: Path) -> Path:
    """GPTQ for one Linear of each layer, for the time it takes."""
    recipe = folder / "r.yaml"
    recipe.write_text("{method: round, weight: {constraint: m2}, rules: [{match: '*.o_proj', method: gptq}]}")
    return recipe


def run(line: list, limit: int | None = None) -> subprocess.CompletedProcess:
    """A fresh process whose data may be no more than ``limit`` bytes."""
    limited = [] if limit is None else ["sh", "-c", 'ulimit -d "$0" && exec "$@"', limit // 1024]
    line = list(map(str, [*limited, *line]))
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | ALLOCATOR)


def quantize(
    model: Path, text: Path, output: Path, recipe: Path, *, windows: int = 8, limit: int | None = None
) -> tuple[dict, str]:
    """The report and what was printed of a fresh process, which may take no more memory than ``limit`` bytes."""
    line = [sys.executable, "-m", "fpq_jax.quantize", "--model", model, "--calibration", text, "--num-samples", windows,
            "--max-windows", windows, "--output", output, "--recipe", recipe]  # fmt: skip
    done = run(line, limit)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((output / "report.json").read_text()), done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process alone is Linux's")
def test_peak_memory_is_flat_in_the_number_of_layers_and_as_estimated(tmp_path, text_file):
    peaks, sizes = {}, {}
    for layers in (4, 40):
        sizes[layers] = write_random_model(tmp_path / f"m{layers}", layers, 384, 1024)
    recipe = write_recipe(tmp_path)
    quantize(tmp_path / "m4", text_file, tmp_path / "warm", recipe)  # compiles, which takes memory too
    for layers in sizes:
        report, printed = quantize(tmp_path / f"m{layers}", text_file, tmp_path / f"out{layers}", recipe)
        peaks[layers] = report["peak_memory_bytes"]
        needed = printed.partition("Needs about ")[2].split()
        estimated = float(needed[0]) * {"MiB": 2**20, "GiB": 2**30}[needed[1]]
        assert 0.75 * peaks[layers] < estimated < 1.6 * peaks[layers], (estimated, peaks)
        (tmp_path / f"out{layers}").rename(tmp_path / f"kept{layers}")
    assert sizes[40] - sizes[4] > 4 * 0.05 * peaks[4], "what a leak would hold must be far above the tolerance"
    assert max(peaks.values()) < 1.05 * min(peaks.values()), peaks


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory are Linux's")
def test_a_checkpoint_larger_than_the_memory_allowed(tmp_path, text_file):
    limit, layers = 1400 * MB, 50
    size = write_random_model(tmp_path / "large", layers, 768, 2048)
    assert size > limit
    recipe = write_recipe(tmp_path)
    report, _ = quantize(tmp_path / "large", text_file, tmp_path / "out", recipe, windows=2, limit=limit)
    assert report["peak_memory_bytes"] < size and len(report["layers"]) == layers * 7
    assert sum(row["error"] < row["rounding_error"] for row in report["layers"]) == layers
    line = [sys.executable, "-m", "fpq_jax.evaluate", "--model", tmp_path / "large", "--eval", text_file,
            "--max-windows", "2", "--report", tmp_path / "r.json"]  # fmt: skip
    assert run(line, limit).returncode == 0
    evaluated = json.loads((tmp_path / "r.json").read_text())
    assert evaluated["peak_memory_bytes"] < size and evaluated["weight_bytes"] > 0.99 * size
    # a limit that nothing fits into is said before any work
    line = [sys.executable, "-m", "fpq_jax.quantize", "--model", tmp_path / "large", "--calibration", text_file]
    done = run(line, 900 * MB)
    assert done.returncode == 2 and "layers.0" not in done.stdout
    sentence = done.stderr.splitlines()[-1]
    assert (
        sentence.startswith("error: Quantizing takes about") and "use a shorter --seq-len, or more memory" in sentence
    )


EXPORT = """
import sys
from pathlib import Path
from fpq_jax import export
from fpq_jax._support.machine import peak_memory
export.main(export.Options(model=sys.argv[1], format="bf16", output=Path(sys.argv[2])))
print(peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process alone is Linux's")
def test_an_exports_peak_memory_is_flat_in_the_number_of_layers(tmp_path):
    peaks, written, kinds = {}, {}, {}
    config = {**TINY_CONFIG, "hidden_size": 768, "intermediate_size": 2048, "num_key_value_heads": 4}
    spec = QuantSpec(constraint="m2")
    for layers in (4, 32):
        model_class = model_class_of(config)
        model = abstract_model(model_class, model_class.Config.from_hf({**config, "num_hidden_layers": layers}))
        params = {}
        for path, leaf in params_of(model).items():
            kind = path.split(".", 2)[-1]
            if kind not in kinds:
                drawn = jax.random.normal(jax.random.key(len(kinds)), leaf.shape)
                linear = path.startswith("layers.") and path.endswith("kernel")
                kinds[kind] = quantize_array(drawn, spec) if linear else drawn
            params[path] = kinds[kind]
        save(tmp_path / f"q{layers}", with_params(model, params))
        done = run([sys.executable, "-c", EXPORT, tmp_path / f"q{layers}", tmp_path / f"out{layers}"])
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[layers] = int(done.stdout.split()[-1])
        written[layers] = (tmp_path / f"out{layers}" / "model.safetensors").stat().st_size
    assert written[32] - written[4] > 4 * 0.05 * peaks[4], "what a leak would hold must be far above the tolerance"
    assert peaks[32] < 1.05 * peaks[4], peaks

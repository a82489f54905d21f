import json

import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import QuantSpec, quantize_array
from fpq_jax._algorithms.quantize_linears import LinearResult
from fpq_jax._pipeline.report import bits_per_weight, environment, layer_row, row_text
from fpq_jax._support.console import size_text
from fpq_jax._support.files import write_json

RESULT = LinearResult("model.layers.0.mlp.up_proj", (48, 80), 0.02, 0.01, None, 0.4, ("rounded",))


def test_bits_count_what_the_quantized_linears_store_and_nothing_else():
    small, large = (quantize_array(jnp.ones((n, 32)), QuantSpec(group_size=64)) for n in (64, 640))
    params = {"layers.0.a": small, "layers.0.b": large, "norm": np.ones(1000), "head": small}
    stored = 64 * 32 // 2 + 4 * 32 + 640 * 32 // 2 + 4 * 32 * 10
    assert bits_per_weight(params) == pytest.approx(8 * stored / (704 * 32))


def test_rows_and_sizes_read_well():
    assert layer_row(RESULT)["shape"] == [48, 80] and layer_row(RESULT)["damping"] is None
    line, note = row_text(RESULT).splitlines()
    assert line.split() == ["model.layers.0.mlp.up_proj", "48", "80", "2.000e-02", "1.000e-02", "-", "0.40"]
    assert note.strip() == "note: rounded"
    assert [size_text(s) for s in (5, 2048, 5 * 2**20, 3 * 2**31)] == ["5 B", "2.0 KiB", "5.0 MiB", "6.00 GiB"]


def test_the_environment_is_measured_and_the_file_is_json(tmp_path):
    found = environment()
    assert found["peak_memory_bytes"] > 50e6 and found["devices"] and found["versions"]["jax"]
    write_json(tmp_path / "r.json", found)
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]

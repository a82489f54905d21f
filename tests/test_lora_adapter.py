"""LoRC as a PEFT adapter: its arithmetic by hand, and read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import FpqError, QuantSpec, lorc, quantize_array
from fpq_jax._storage.lora_adapter import AdapterWriter, low_rank_of, read_rank, tensor_names
from fpq_jax._storage.tensor_files import SafetensorsFile

W = jax.random.normal(jax.random.key(0), (40, 24))
PLAIN = quantize_array(W, QuantSpec(group_size=32, constraint="m2"))
WEIGHTS = {
    "layers.0.a": lorc(W, PLAIN, rank=5),
    "layers.0.b": lorc(W, PLAIN, rank=2, dtype="int8"),
    "layers.0.c": PLAIN,
    "layers.1.a": lorc(W, PLAIN, rank=3, dtype="int8"),
}


def write(folder, weights):
    writer = AdapterWriter(folder, weights)
    for name, q in weights.items():
        writer.write(name, q)
    writer.close()
    return writer


def test_products_are_the_corrections_whatever_the_ranks_and_dtypes(tmp_path):
    writer = write(tmp_path / "lorc", WEIGHTS)
    file = SafetensorsFile(tmp_path / "lorc" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lorc" / "adapter_config.json").read_text())
    assert read_rank(tmp_path / "lorc") == writer.rank == config["r"] == config["lora_alpha"] == 5
    assert config["target_modules"] == ["layers.0.a", "layers.0.b", "layers.1.a"]
    assert writer.nbytes == sum(file.read(name).nbytes for name in file.names())
    for name, q in WEIGHTS.items():
        tensors = {side: key for side, key in tensor_names(name).items() if key in file.names()}
        assert bool(tensors) == (q.low_rank is not None)
        if not tensors:
            continue
        a, b = (file.read(tensors[side]).astype(np.float64) for side in ("lora_A", "lora_B"))
        assert a.shape == (5, 40) and b.shape == (24, 5)
        # y = x + lora_B(lora_A(x)) * lora_alpha / r
        np.testing.assert_allclose((b @ a).T, q.low_rank.product(), atol=1e-6)
        read = low_rank_of({side: jnp.asarray(file.read(key)) for side, key in tensors.items()})
        np.testing.assert_allclose(read.product(), q.low_rank.product(), atol=1e-6)


def test_without_lorc_nothing_is_written(tmp_path):
    writer = write(tmp_path / "lorc", {"c": PLAIN})
    assert writer.rank == writer.nbytes == 0 and not (tmp_path / "lorc").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": 16}, "of another adapter than fpq_jax writes"),
        ({"r": None}, "of another"),
        (None, "no adapter's"),
    ],
)
def test_another_adapter_is_refused(change, said, tmp_path):
    write(tmp_path / "lorc", WEIGHTS)
    path = tmp_path / "lorc" / "adapter_config.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FpqError, match=said):
        read_rank(tmp_path / "lorc")

import sys
from pathlib import Path

import pytest

from fpq_jax import FpqError
from fpq_jax._checkpoints.demo import demo_model_path, demo_topics, is_demo
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._checkpoints.sources import resolve_model


def test_the_split_of_the_topics_is_whole_and_disjoint():
    from pydoc_data.topics import topics

    kept, held_out = demo_topics(held_out=False), demo_topics(held_out=True)
    assert sorted(kept + held_out) == sorted(text.strip() for text in topics.values())
    assert 0.05 < sum(map(len, held_out)) / sum(map(len, kept + held_out)) < 0.4
    assert not set(kept) & set(held_out)


def test_a_folder_of_a_demo_models_name_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo-opt").name == "demo_opt"
    (tmp_path / "demo-opt").mkdir()
    assert resolve_model("demo-opt") == Path("demo-opt") and not is_demo("demo-opt")


def test_a_python_without_topics_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FpqError, match="--calibration FILE"):
        demo_topics(held_out=True)


@pytest.mark.parametrize("model", ["demo-llama", "demo-opt"])
def test_the_shipped_models_are_small_bfloat16_ones_with_several_groups_in_a_row(model):
    checkpoint = HfCheckpoint(demo_model_path(model))
    assert is_demo(model) and checkpoint.config["model_type"] == model.removeprefix("demo-")
    assert checkpoint.dtype == "bfloat16"
    assert (checkpoint.folder / "model.safetensors").stat().st_size < 12e6
    assert checkpoint.model_config.hidden_size >= 256
    assert max(max(shape) for path, shape in checkpoint.shapes.items() if path.startswith("layers.")) > 2 * 256
    assert (checkpoint.folder / "README.md").is_file()

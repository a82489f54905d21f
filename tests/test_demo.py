import sys

import pytest
from fpq_jax.models import open_checkpoint

from fpq_jax import FpqError
from fpq_jax._demo import demo_model_path, demo_topics


def test_the_split_of_the_topics_is_whole_and_disjoint():
    from pydoc_data.topics import topics

    kept, held_out = demo_topics(held_out=False), demo_topics(held_out=True)
    assert sorted(kept + held_out) == sorted(text.strip() for text in topics.values())
    assert 0.05 < sum(map(len, held_out)) / sum(map(len, kept + held_out)) < 0.4
    assert not set(kept) & set(held_out)


def test_a_python_without_topics_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FpqError, match="--calibration FILE"):
        demo_topics(held_out=True)


def test_the_shipped_model_is_a_small_bfloat16_llama_with_several_groups_in_a_row():
    checkpoint = open_checkpoint(demo_model_path())
    assert checkpoint.dtype == "bfloat16"
    assert (checkpoint.folder / "model.safetensors").stat().st_size < 12e6
    assert checkpoint.model_config.hidden_size >= 256
    assert checkpoint.model_config.intermediate_size > 2 * 256
    assert (checkpoint.folder / "README.md").is_file()

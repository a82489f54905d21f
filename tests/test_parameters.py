import jax.numpy as jnp
import numpy as np
from conftest import TINY_CONFIG, random_tensors, write_checkpoint

from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax.models.llama import Llama
from fpq_jax.models.parameters import to_hf_tensors

NAME = "model.layers.1.mlp.up_proj.weight"


def test_parameters_convert_both_ways(tmp_path):
    tensors = random_tensors(TINY_CONFIG)
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path / "m", TINY_CONFIG, tensors))
    params = checkpoint.read(jnp.float32)
    np.testing.assert_array_equal(params["layers.1.mlp.up_proj.kernel"], tensors[NAME].T)
    back = to_hf_tensors(Llama, params)
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in tensors)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    assert checkpoint.read(jnp.float32, "layers.1.mlp.up").keys() == {"layers.1.mlp.up_proj.kernel"}

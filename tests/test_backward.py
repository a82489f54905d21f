"""The Fisher information layer by layer against gradients of the whole model, window by window."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, mostly_full, random_tensors, write_checkpoint

import fpq_jax as fpq
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.backward import layers_behind
from fpq_jax._pipeline.batches import Batches
from fpq_jax._support.placement import replicate
from fpq_jax._support.trees import below
from fpq_jax.models.parameters import params_of, with_params
from fpq_jax.models.spec import ModelSpec


@pytest.mark.parametrize(
    "config", mostly_full([TINY_CONFIG, OPT_CONFIG, TINY_CONFIG | {"tie_word_embeddings": True}], 1)
)
def test_it_is_that_of_the_whole_models_gradients(config, tmp_path):
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path / "m", config, random_tensors(config)))
    model_spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, np.dtype(np.float32))
    windows = np.random.default_rng(0).integers(0, 300, (5, 12)).astype(np.int32)
    mesh = fpq.make_mesh()
    batches = Batches.of(windows, mesh, 2)  # the last row fills up

    def read(name):
        part = replicate(checkpoint.read_dense_part(name, jnp.float32), mesh)
        return below(part, f"{name}.") if name.startswith("layers.") else part

    model = fpq.load(checkpoint.folder, dtype=jnp.float32)
    params = params_of(model)
    of_layer = lambda i: below(
        {path: leaf for path, leaf in params.items() if path.endswith(".kernel")}, f"layers.{i}."
    )
    kernels = [list(of_layer(i)) for i in (0, 1)]
    places = tmp_path / "states"
    places.mkdir()
    steps = []
    behind = list(layers_behind(model_spec, read, kernels, batches, places, seed=3, advance=steps.append))
    found = {one.number: one.fishers for one in behind}
    assert list(found) == [1, 0] and sum(steps) == 4
    assert [path.name for path in places.iterdir()] == ["gradient.0.0.npy"]

    expected = {}
    every = {path: params[path] for path in params if path.startswith("layers.") and path.endswith(".kernel")}
    for number, window in enumerate(windows):

        def loss(kernels, window=window, number=number):
            log_p = jax.nn.log_softmax(with_params(model, params | kernels)(jnp.asarray(window)[None])[0])
            key = jax.random.fold_in(jax.random.key(3), number)
            return -jnp.sum(log_p[jnp.arange(12), jax.random.categorical(key, jax.lax.stop_gradient(log_p))])

        for path, gradient in jax.grad(loss)(every).items():
            g = np.asarray(gradient, np.float64)
            inputs, outputs = expected.get(path, (0, 0))
            expected[path] = inputs + g @ g.T, outputs + (g**2).sum(axis=0)
    for i in (0, 1):
        for path, fisher in found[i].items():
            inputs, outputs = expected[f"layers.{i}.{path}"]
            assert fisher.tokens == windows.size
            np.testing.assert_allclose(fisher.inputs, inputs, rtol=1e-3, atol=1e-4 * np.abs(inputs).max())
            np.testing.assert_allclose(fisher.outputs, outputs, rtol=1e-3, atol=1e-4 * outputs.max())


def test_a_pass_that_was_stopped_goes_on(tiny_llama, tmp_path, monkeypatch):
    checkpoint = HfCheckpoint(tiny_llama)
    model_spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, np.dtype(np.float32))
    mesh = fpq.make_mesh()
    batches = Batches.of(np.random.default_rng(0).integers(0, 300, (3, 12)).astype(np.int32), mesh, 2)
    reads = []

    def read(name):
        reads.append(name)
        part = replicate(checkpoint.read_dense_part(name, jnp.float32), mesh)
        return below(part, f"{name}.") if name.startswith("layers.") else part

    def behind(finished=None):
        kernels = [["self_attn.q_proj.kernel"], ["mlp.down_proj.kernel"]]
        return layers_behind(model_spec, read, kernels, batches, tmp_path, finished=finished)

    whole = list(behind())
    assert reads == ["embedding", "layers.0", "layers.1", "head", "layers.1", "layers.0"]
    for stopped in (False, True):  # after the first layer was taken, and before the next one was asked for
        first = behind()
        chex.assert_trees_all_equal(next(first).fishers, whole[0].fishers)
        if stopped:
            monkeypatch.setattr("fpq_jax._pipeline.backward._backward", None)
            with pytest.raises(TypeError):
                next(first)
            monkeypatch.undo()
        reads.clear()
        (second,) = behind(finished=1)
        assert reads == ["layers.0"] and second.number == 0
        chex.assert_trees_all_equal(second.fishers, whole[1].fishers)
    # where a file is missing it starts again
    next(behind())
    next(tmp_path.glob("hidden.0.*")).unlink()
    assert [one.number for one in behind(finished=1)] == [1, 0]

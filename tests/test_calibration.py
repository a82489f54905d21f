"""A decoder layer's statistics, stage by stage, and beside the layer in full precision."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, random_tensors, write_checkpoint

import fpq_jax as fpq
from fpq_jax._algorithms.linear_recipe import LinearRecipe
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._pipeline.batches import Batches
from fpq_jax._pipeline.calibration import Stream, calibrate, recorded_kernels, stages
from fpq_jax.models.llama import Llama, LlamaConfig
from fpq_jax.models.opt import Opt, OptConfig
from fpq_jax.models.parameters import params_of, with_params
from fpq_jax.models.spec import ModelSpec

SPEC = fpq.QuantSpec(constraint="m2", group_size=16)
FIRST = [f"self_attn.{name}_proj.kernel" for name in "qkv"]
SECOND = "self_attn.o_proj.kernel"


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """(what the model is, the first layer's parameters)."""
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "tiny", TINY_CONFIG, random_tensors(TINY_CONFIG))
    spec = ModelSpec(Llama, LlamaConfig.from_hf(TINY_CONFIG), np.dtype(np.float32))
    return spec, params_of(fpq.load(folder, dtype=jnp.float32).layers[0])


def stream(seed):
    return np.random.default_rng(seed).standard_normal((2, 4, 10, 48)).astype(np.float32)


def input_of(model_spec, params, path, hidden):
    """What the layer multiplies the kernel at ``path`` by."""
    kept = []

    class Kept:
        def __rmatmul__(self, x):
            kept.append(x)
            return x @ params[path]

    from fpq_jax._matmul.linear import linear

    def keeping(x, kernel, bias):
        return x @ kernel if isinstance(kernel, Kept) else linear(x, kernel, bias)

    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpq_jax.models.layers.linear", keeping)
        with_params(model_spec.layer(), params | {path: Kept()})(jnp.asarray(hidden), positions)
    return np.asarray(kept[0])


def test_a_stage_behind_quantized_ones_beside_the_layer_in_full_precision(layer):
    model_spec, params = layer
    hidden, others = stream(0), stream(0) + 0.1 * stream(1)
    batches = Batches.of(np.zeros((7, 10), np.int32), fpq.make_mesh(), 4)  # the last row fills up
    small = params | {path: fpq.quantize_array(params[path], SPEC) for path in FIRST}
    kernels = recorded_kernels({SECOND: LinearRecipe(spec=SPEC)}, params)
    found = calibrate(
        model_spec, Stream(small, list(hidden)), kernels, batches, reference=Stream(params, list(others))
    ).of(SECOND)

    rows = lambda batches: np.concatenate(batches).astype(np.float64)[:7].reshape(70, -1)
    x = rows([fake_quantize_tokens(jnp.asarray(input_of(model_spec, small, SECOND, h)), fpq.E4M3) for h in hidden])
    r = rows([input_of(model_spec, params, SECOND, h) for h in others])
    assert found.count == 70
    np.testing.assert_allclose(found.hessian, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())
    np.testing.assert_allclose(found.cross, x.T @ (r - x), rtol=1e-3, atol=1e-4 * np.abs(x.T @ x).max())
    assert np.abs(found.cross).max() > 1e-2 * np.abs(found.hessian).max()


def test_nothing_to_record_is_nothing(layer):
    model_spec, params = layer
    batches = Batches.of(np.zeros((4, 10), np.int32), fpq.make_mesh(), 4)
    assert calibrate(model_spec, Stream(params, [stream(0)[0]]), (), batches) == ({}, {})


def test_stages_are_the_inputs_in_the_order_of_the_layer():
    """Whatever the order in which the kernels are given."""
    llama = ModelSpec(Llama, LlamaConfig.from_hf(TINY_CONFIG), np.dtype(np.float32))
    opt = ModelSpec(Opt, OptConfig.from_hf(OPT_CONFIG), np.dtype(np.float32))
    for spec, attention, mlp in (
        (llama, "self_attn.o_proj", [{"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]),
        (opt, "self_attn.out_proj", [{"fc1"}, {"fc2"}]),
    ):
        expected = [{f"self_attn.{name}_proj" for name in "qkv"}, {attention}, *mlp]
        names = sorted((name for stage in expected for name in stage), reverse=True)
        found = stages(spec, {f"{name}.kernel": LinearRecipe(spec=SPEC) for name in names})
        assert [{path.removesuffix(".kernel") for path in stage} for stage in found] == expected

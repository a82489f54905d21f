import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, abstract_quantized
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from fpq_jax import FpqError, QuantSpec, lorc, quantize_array
from fpq_jax._matmul.linear import RowParallelKernel
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._support.mesh import abstract_mesh
from fpq_jax.models.parameters import abstract_model, params_of
from fpq_jax.models.registry import model_class_of
from fpq_jax.models.sharding import shardings

TWO = AbstractMesh((1, 2), ("data", "model"))
WHOLE, ROWS, COLUMNS = P(), P("model"), P(None, "model")


def specs_of(path, leaf, mesh=TWO, config=TINY_CONFIG):
    """The specs of a parameter at ``path``; of a QTensor those of its arrays by name."""
    model_class = model_class_of(config)
    found = shardings(model_class, model_class.Config.from_hf(config), {path: leaf}, mesh)[path]
    if not isinstance(found, QTensor):
        return found.spec
    names = ("codes", "row_scale", "exponents", "group_scale", "zero", "input_scale")
    specs = {name: getattr(found, name).spec for name in names if getattr(found, name) is not None}
    if found.low_rank is not None:
        specs |= {"a": found.low_rank.a.spec, "b": found.low_rank.b.spec}
    return specs


def weight(inputs, outputs, rank=2, **spec):
    def make(w):
        q = quantize_array(w, QuantSpec(**spec))
        return lorc(w, q, rank=rank) if rank else q

    return jax.eval_shape(make, jax.ShapeDtypeStruct((inputs, outputs), jnp.float32))


Q_PROJ, O_PROJ = "layers.0.self_attn.q_proj.kernel", "layers.0.self_attn.o_proj.kernel"


def test_a_linear_divided_by_its_outputs():
    m2 = specs_of(Q_PROJ, weight(64, 48, group_size=16, constraint="m2"))
    assert m2 == {"codes": ROWS, "row_scale": ROWS, "exponents": ROWS, "a": WHOLE, "b": COLUMNS}
    free = specs_of(Q_PROJ, weight(64, 48, 0, group_size=16, format="int4-asym", activation="int8-asym"))
    assert free == {"codes": ROWS, "group_scale": ROWS, "zero": ROWS}
    tensor = specs_of(Q_PROJ, weight(64, 48, 0, group_size="tensor", format="e4m3"))
    assert tensor == {"codes": ROWS, "row_scale": WHOLE}
    assert (
        specs_of(Q_PROJ, jnp.ones((64, 48))) == COLUMNS
        and specs_of(Q_PROJ.replace("kernel", "bias"), jnp.ones(48)) == ROWS
    )


def test_a_linear_divided_by_its_inputs():
    m2 = specs_of(O_PROJ, weight(64, 48, group_size=16, constraint="m2"))
    assert m2 == {"codes": COLUMNS, "row_scale": WHOLE, "exponents": COLUMNS, "a": ROWS, "b": WHOLE}
    free = specs_of(O_PROJ, weight(64, 48, 0, group_size=32, format="int4-asym", activation="int8-asym"))
    assert free == {"codes": COLUMNS, "group_scale": COLUMNS, "zero": COLUMNS}
    channel = specs_of(O_PROJ, weight(64, 48, 0, group_size="channel", format="int8-asym", activation="int8-asym"))
    assert channel == {"codes": COLUMNS, "row_scale": WHOLE, "zero": WHOLE}
    assert (
        specs_of(O_PROJ, jnp.ones((64, 48))) == ROWS
        and specs_of(O_PROJ.replace("kernel", "bias"), jnp.ones(48)) == WHOLE
    )


def test_what_cannot_be_cut_there_is_whole():
    # a group of two devices' inputs, a byte of two devices' inputs, a vocabulary of an odd size
    assert specs_of(O_PROJ, weight(96, 48, group_size=32, constraint="m2"))["exponents"] == WHOLE
    odd = specs_of(O_PROJ, weight(90, 48, group_size=15, constraint="m2"))
    assert odd["codes"] == WHOLE and odd["exponents"] == COLUMNS
    assert specs_of(O_PROJ, weight(90, 48, group_size="channel", format="e4m3"))["codes"] == COLUMNS
    for path, shape in (("lm_head.kernel", (48, 301)), ("embed_tokens.embedding", (301, 48))):
        assert specs_of(path, jnp.ones(shape)) == WHOLE


@pytest.mark.parametrize(("config", "row"), [(TINY_CONFIG, "o"), (OPT_CONFIG, "out")])
def test_a_whole_model(config, row):
    model_class = model_class_of(config)
    model_config = model_class.Config.from_hf(config)
    params = params_of(abstract_model(model_class, model_config))
    found = {path: where.spec for path, where in shardings(model_class, model_config, params, TWO).items()}
    assert found["embed_tokens.embedding"] == ROWS
    assert found[f"layers.0.self_attn.{row}_proj.kernel"] == ROWS
    whole = [path for path, spec in found.items() if spec == WHOLE]
    # norms, OPT's positions, and the biases of what is divided by inputs
    assert all(re.search(r"norm|positions|(out_proj|fc2)\.bias", path) for path in whole)


def test_a_prepared_model_has_parts_of_merged_outputs_and_knows_which_inputs_are_divided():
    model = abstract_quantized(TINY_CONFIG, QuantSpec(group_size=32, constraint="m2"), rank=2, mesh=TWO)
    params = params_of(model)
    assert params["layers.0.self_attn.qkv_proj.kernel"].codes.sharding.spec == ROWS
    assert params["layers.0.mlp.gate_up_proj.kernel"].low_rank.b.sharding.spec == COLUMNS
    divided = {path for path, leaf in params.items() if isinstance(leaf, RowParallelKernel)}
    assert divided == {f"layers.{i}.{name}.kernel" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert params["layers.1.mlp.down_proj.kernel"].kernel.codes.sharding.spec == COLUMNS
    assert model.mesh == model.embed_tokens.mesh == abstract_mesh(TWO)


def test_sizes_that_the_axis_does_not_divide_are_said():
    three, four = (AbstractMesh((1, n), ("data", "model")) for n in (3, 4))
    with pytest.raises(FpqError, match="num_key_value_heads is 2, which the mesh's model axis of 4 does not divide"):
        specs_of(Q_PROJ, jnp.ones((64, 48)), four)
    with pytest.raises(FpqError, match="num_attention_heads is 4, which the mesh's model axis of 3"):
        specs_of(Q_PROJ, jnp.ones((64, 48)), three, OPT_CONFIG)
    with pytest.raises(FpqError, match="ffn_dim is 81, which the mesh's model axis of 2"):
        specs_of(Q_PROJ, jnp.ones((64, 48)), TWO, OPT_CONFIG | {"ffn_dim": 81})
    with pytest.raises(FpqError, match=r"make one with fpq_jax\.make_mesh"):
        specs_of(Q_PROJ, jnp.ones((64, 48)), AbstractMesh((2,), ("model",)))


@pytest.mark.full
def test_eight_devices_give_what_one_gives():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    tests = str(Path(__file__).with_name("eight_devices.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and "passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-5000:]

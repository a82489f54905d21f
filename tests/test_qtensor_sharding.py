"""Where a QTensor's arrays go."""

from dataclasses import replace

import jax
import jax.numpy as jnp

import fpq_jax as fpq
from fpq_jax._numerics.qtensor_sharding import shard_like, shardings_like

RECIPE = fpq.Recipe.load("w4a8-fp-m2-lorc").with_group_size(8)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_sharded_parameters_arrays_lie_as_it_does():
    """Abstractly, on eight devices: stack, outputs and inputs are divided as the parameter's axes are."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("layer", "row", "column"))
    spec = jax.sharding.PartitionSpec
    axes = fpq.Axes.of(("stack", "in", "out", "out"), (4, 16, 4, 6), "float32")
    make = lambda w: jax.vmap(lambda w: fpq.lorc(w, fpq.quantize_array(w, RECIPE.default.spec), rank=3))(w)
    q = jax.eval_shape(make, jax.ShapeDtypeStruct((4, 16, 24), jnp.float32))
    where = shardings_like(
        replace(q, axes=axes), jax.sharding.NamedSharding(mesh, spec("layer", "row", ("column",), None))
    )
    assert where.codes.spec == spec("layer", ("column",), "row")
    assert where.row_scale.spec == spec("layer", ("column",))
    assert where.exponents.spec == spec("layer", ("column",), "row")
    assert where.low_rank.a.spec == spec("layer", "row")
    assert where.low_rank.b.spec == spec("layer", None, ("column",))
    # what an axis does not divide is whole there
    rounded = lambda w: fpq.quantize_array(w, RECIPE.default.spec)
    odd = jax.eval_shape(rounded, jax.ShapeDtypeStruct((10, 7), jnp.float32))
    odd = replace(odd, axes=fpq.Axes.of(("in", "out"), (10, 7), "float32"))
    where = shardings_like(odd, jax.sharding.NamedSharding(mesh, spec("row", "column")))
    assert where.codes.spec == spec() == where.row_scale.spec
    # a parameter on one device: there
    w = jax.device_put(_normal(1, 8, 4), jax.devices()[0])
    assert shard_like(rounded(w), w).codes.devices() == w.devices()

"""Kernels side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import QuantSpec, dequantize, linear, lorc, quantize_array
from fpq_jax._numerics.concatenate import can_concatenate, concatenate

SPECS = [
    QuantSpec(group_size=32, constraint="m2"),
    QuantSpec(group_size=32, constraint="m1", activation=None),
    QuantSpec(group_size=32),
    QuantSpec(format="e4m3", group_size="channel"),
    QuantSpec(format="int4-asym", group_size=32, activation="int8-asym"),
    QuantSpec(format="int8", group_size="channel", activation="int8"),
]


def weight(outputs, seed=0, inputs=100):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((inputs, outputs)), jnp.float32)


def several(spec, ranks=(4, 0, 2), dtype="bfloat16"):
    kernels = []
    for seed, (outputs, rank) in enumerate(zip((24, 7, 40), ranks, strict=True)):
        w = weight(outputs, seed)
        q = quantize_array(w, spec)
        kernels.append(lorc(w, q, rank=rank, dtype=dtype) if rank else q)
    return kernels


@pytest.mark.parametrize("spec", SPECS, ids=["m2", "m1", "free", "w8", "int4", "int8"])
@pytest.mark.parametrize("dtype", mostly_full(["bfloat16", "int8"], 1))
def test_concatenated_kernels_are_the_same_weights_and_products(spec, dtype):
    kernels = several(spec, dtype=dtype)
    assert can_concatenate(kernels)
    one = concatenate(kernels)
    assert one.shape == (100, 71) and one.low_rank.a.shape == (100, 6)
    np.testing.assert_array_equal(
        dequantize(one, low_rank=False), jnp.hstack([dequantize(k, low_rank=False) for k in kernels])
    )
    np.testing.assert_allclose(dequantize(one), jnp.hstack([dequantize(k) for k in kernels]), rtol=1e-6, atol=1e-7)
    x = jnp.asarray(np.random.default_rng(9).standard_normal((3, 100)), jnp.float32)
    # in bfloat16 LoRC may round its inner activation in one program and not in another
    apart = jnp.hstack([jax.jit(linear)(x, k) for k in kernels])
    np.testing.assert_allclose(jax.jit(linear)(x, one), apart, atol=2e-4 * float(jnp.abs(apart).max()))


def test_shards_have_their_part_of_every_kernel():
    kernels = [quantize_array(weight(outputs, outputs), SPECS[0]) for outputs in (24, 8, 40)]
    kernels = [lorc(weight(24, 24), kernels[0], rank=4), *kernels[1:]]
    halves = lambda w: [jnp.split(w, 2, axis=1)[i] for i in (0, 1)]
    expected = jnp.hstack([part for i in (0, 1) for part in [halves(dequantize(k))[i] for k in kernels]])
    np.testing.assert_allclose(dequantize(concatenate(kernels, 2)), expected, rtol=1e-6, atol=1e-7)


def test_kernels_that_differ_stay_apart():
    spec = SPECS[0]
    kernels = several(spec)
    other = quantize_array(weight(7), dataclasses.replace(spec, group_size=16))
    assert not can_concatenate([*kernels, other])
    assert not can_concatenate([*kernels, weight(7)])
    assert not can_concatenate([weight(7), weight(7).astype(jnp.bfloat16)])
    assert not can_concatenate([several(spec, dtype="int8")[0], kernels[2]])
    whole = QuantSpec(format="e4m3", group_size="tensor")
    assert not can_concatenate([quantize_array(weight(7), whole)] * 2)
    static = [dataclasses.replace(k, input_scale=jnp.ones(1)) for k in kernels]
    assert not can_concatenate(static)
    np.testing.assert_array_equal(concatenate([weight(3), weight(4)]), jnp.hstack([weight(3), weight(4)]))
    plain = concatenate(several(spec, ranks=(0, 0, 0)))
    assert plain.low_rank is None

"""Codes in the order of the kernel's threads: where each is, and that they come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import FpqError, QuantSpec, dequantize, lorc, pack, quantize_array
from fpq_jax._matmul.fp4_kernel.fragments import Fragments, fragments, of_fragments, table, takes
from fpq_jax._numerics.qtensor import QTensor

SPECS = [
    QuantSpec(constraint="m2"),
    QuantSpec(constraint="m1", group_size=64, format="e3m0"),
    QuantSpec(group_size=32, format="int4"),
    QuantSpec(group_size=96, constraint="m2", compute_rows=4),
    QuantSpec(group_size=160),
    QuantSpec(group_size=512),
    QuantSpec(group_size="channel"),
    QuantSpec(group_size="tensor", format="e2m1-qtorch"),
]


def weight(shape, spec, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape)
    return quantize_array(jnp.asarray(w, jnp.float32), spec)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", mostly_full(SPECS, 3), ids=lambda s: f"{s.format}-{s.group_size}-{s.constraint}")
def test_nothing_is_lost(spec):
    shape = [(640, 200), (1100, 64), (70, 3)][SPECS.index(spec) % 3]
    q = weight(shape, spec)
    assert takes(q)
    f = fragments(lorc(jnp.zeros(shape), q, rank=2))
    assert f.words.shape == (-(-shape[1] // 64), 4 * -(-shape[0] // 64), 128) and f.words.dtype == jnp.uint32
    same(of_fragments(f), lorc(jnp.zeros(shape), q, rank=2))


def test_every_code_is_where_the_instruction_wants_it():
    """Word by word and bit by bit, as the PTX ISA has the fragments of m64nNk32 with 8-bit factors."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (128, 192)).astype(np.uint8)
    q = QTensor(pack(jnp.asarray(codes)), spec=QuantSpec(group_size="channel"), shape=(192, 128))
    words = np.asarray(fragments(q).words).reshape(2, 3, 128, 4)  # blocks of outputs, of inputs, threads, words
    for _ in range(2000):
        tile, unit, thread, word, h, j = (int(rng.integers(n)) for n in (2, 3, 128, 4, 2, 4))
        warp, lane = divmod(thread, 32)
        code = codes[64 * tile + 16 * warp + 8 * h + lane // 4, 64 * unit + 16 * word + 4 * (lane % 4) + j]
        found = int(words[tile, unit, thread, word])
        assert found >> 4 * (4 * h + j) & 7 == code & 7
        assert found >> (8 * j + (7, 3)[h]) & 1 == code >> 3


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4", "nf4"])
def test_tables_are_the_formats_numbers(name):
    fmt = QuantSpec(format=name).format
    np.testing.assert_array_equal(table(fmt).view(jnp.float8_e4m3fn).astype(np.float32), fmt.table)


def test_int4s_lowest_code_is_kept():
    codes = jnp.full((64, 64), 8, jnp.uint8)
    q = QTensor(
        pack(codes), row_scale=jnp.ones((64, 1)), spec=QuantSpec(format="int4", group_size="channel"), shape=(64, 64)
    )
    np.testing.assert_array_equal(dequantize(of_fragments(fragments(q))), -8)


@pytest.mark.full
def test_stacks_of_weights():
    stack = jax.vmap(lambda w: quantize_array(w, SPECS[0]))(jax.random.normal(jax.random.key(0), (3, 300, 70)))
    f = jax.vmap(fragments)(stack)
    assert f.stack == (3,) and isinstance(f, Fragments)
    same(of_fragments(f), stack)
    same(of_fragments(stack), stack)


def test_what_it_is_not_for():
    for spec in (
        QuantSpec(format="e4m3", group_size="channel"),
        QuantSpec(activation="int8"),
        QuantSpec(activation=None),
        QuantSpec(activation="e5m2"),
        QuantSpec(format="int4-asym"),
    ):
        assert not takes(weight((64, 8), spec)), spec
    with pytest.raises(FpqError, match="groups of a multiple of 32 inputs, not of 48; use weights fp8 or packed"):
        fragments(weight((192, 8), QuantSpec(group_size=48)))

"""The kernel's arithmetic, tile by tile, against the other ways to multiply and against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

import fpq_jax as fpq
from fpq_jax import FpqError, QuantSpec, dequantize, linear, lorc, quantize_array
from fpq_jax._matmul.fp4_kernel import matmul as matmul_module
from fpq_jax._matmul.fp4_kernel.fragments import Fragments, fragments, group_length, table
from fpq_jax._matmul.fp4_kernel.matmul import matmul
from fpq_jax._matmul.fp4_kernel.reference import added_up, partial_sums
from fpq_jax._matmul.fp4_kernel.schedule import Schedule
from fpq_jax._matmul.weight_layouts import to_layout
from fpq_jax._numerics.activations import fake_quantize_tokens

M2 = fpq.Recipe.load("w4a8-fp-m2")
SPECS = {
    "m2": QuantSpec(constraint="m2"),
    "m1, groups of 64": QuantSpec(constraint="m1", group_size=64),
    "e3m0": QuantSpec(format="e3m0", constraint="m2", group_size=128),
    "nf4": QuantSpec(format="nf4", constraint="m2", group_size=128),
    "int4": QuantSpec(format="int4", constraint="m2", group_size=32),
    "free": QuantSpec(group_size=96),
    "free, groups of two steps": QuantSpec(group_size=512),
    "a scale a row": QuantSpec(group_size="channel"),
}


def operands(tokens, inputs, outputs, spec, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((inputs, outputs)) * np.exp2(rng.integers(-6, 4, (inputs, 1)))
    x = rng.standard_normal((tokens, inputs)) * np.exp(rng.standard_normal((tokens, 1)))
    return jnp.asarray(x, jnp.float32), quantize_array(jnp.asarray(w, jnp.float32), spec)


def exact(x, q):
    return np.asarray(fake_quantize_tokens(x, fpq.E4M3), np.float64) @ np.asarray(dequantize(q), np.float64)


def close(found, expected, bound=1e-6):
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("tokens", "name"), mostly_full([(40, "m2"), *((1, name) for name in SPECS if name != "m2")], 2)
)
def test_a_product_is_what_float64_says(tokens, name):
    x, q = operands(tokens, 1100, 200, SPECS[name])
    close(linear(x, fragments(q)), exact(x, q))


@pytest.mark.parametrize("spec", mostly_full([SPECS[name] for name in ("m1, groups of 64", "int4")], 1), ids=str)
def test_it_is_what_expanded_weights_give(spec):
    """Up to the order of float32 sums; LoRC and bias too."""
    x, q = operands(5, 900, 150, spec, seed=1)
    q = lorc(dequantize(q) + 0.1, q, rank=4)
    bias = jnp.linspace(-1, 1, 150)
    held = {how: to_layout(q, how) for how in ("fp8", "fragments")}
    assert isinstance(held["fragments"], Fragments) and not isinstance(held["fp8"], Fragments)
    close(linear(x, held["fragments"], bias), np.asarray(linear(x, held["fp8"], bias)))
    many = jnp.tile(x, (40, 1))  # more tokens than the kernel is for
    np.testing.assert_array_equal(linear(many, held["fragments"], bias), linear(many, held["fp8"], bias))


@pytest.mark.full
def test_any_schedule_gives_the_product_and_leaves_the_poison_out():
    """Runs that begin and end anywhere; slots that nobody writes are NaN and do not count."""
    rng = np.random.default_rng(2)
    (m, k, n), spec = (21, 1100, 330), SPECS["m1, groups of 64"]
    x, q = operands(m, k, n, spec)
    f, codes = fragments(q), x.astype(jnp.float8_e4m3fn)
    expected = np.asarray(codes, np.float64) @ np.asarray(dequantize(q), np.float64)
    poisoned = 0
    for _ in range(5):
        tokens, warpgroups = int(rng.choice([8, 16, 64])), int(rng.choice([1, 2, 4]))
        s = Schedule(m, k, n, group_length(spec, k), tokens, warpgroups, 4, int(rng.integers(1, 30)))
        slots = jax.jit(partial(partial_sums, table=table(spec.format), s=s))(codes, f.words, f.group_scale)
        assert slots.shape == (s.slots, s.rows, 64 * len(f.words))
        poisoned += int(np.isnan(slots).any())
        close(added_up(slots, s) * f.row_scale.T, expected)
    assert poisoned > 1
    close(matmul(codes, f, s) * f.row_scale.T, expected)


@pytest.mark.full
def test_gradients_are_those_of_linear():
    x, q = operands(3, 300, 70, SPECS["m2"])
    grads = [jax.grad(lambda x, held=held: (linear(x, held) ** 2).sum())(x) for held in (fragments(q), q)]
    close(grads[0], np.asarray(grads[1]), 1e-5)


@pytest.mark.full
def test_other_peoples_functions_and_stacks():
    """A scan over stacked weights, a single vector, and an expert's axis under vmap."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"layers": jax.random.normal(keys[0], (3, 128, 128)), "head": jax.random.normal(keys[1], (128, 40))}

    def apply(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w / 11), None), x, params["layers"])
        return x @ params["head"], jnp.einsum("td,edf->etf", x, params["layers"])

    x = jax.random.normal(jax.random.key(2), (4, 128))
    uses = fpq.find_kernels(apply, params, x)
    small = fpq.quantize_params(params, M2, uses=uses)
    ready = fpq.expand_params(small, "fragments")
    assert all(
        isinstance(leaf, Fragments) for leaf in jax.tree.leaves(ready, is_leaf=lambda a: isinstance(a, Fragments))
    )
    found, expected = (fpq.quantized(apply, strict=True)(tree, x) for tree in (ready, fpq.expand_params(small, "fp8")))
    for one, other in zip(found, expected, strict=True):
        close(one, np.asarray(other), 1e-5)
    for one, other in zip(*(map(jax.tree.leaves, map(fpq.dequantize_params, (ready, small)))), strict=True):
        np.testing.assert_array_equal(one, other)
    back = fpq.expand_params(ready, "packed")
    assert jax.tree.structure(back) == jax.tree.structure(small)


def test_a_tree_is_saved_as_it_was_before(tmp_path):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (300, 70))}}
    small = fpq.quantize_params(params, M2)
    fpq.save(tmp_path / "out", fpq.expand_params(small, "fragments"))
    loaded = fpq.load(tmp_path / "out", like=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.full
def test_trees_are_expanded_under_transformations():
    params = {"kernel": jax.random.normal(jax.random.key(0), (300, 70))}
    small = fpq.quantize_params(params, M2)
    for how in ("fp8", "fragments"):
        expand = partial(fpq.expand_params, weights=how)
        now, later = expand(small), jax.jit(expand)(small)
        assert jax.tree.structure(now) == jax.tree.structure(later)
        for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(later), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_under_64_bits():
    x, q = operands(2, 300, 70, SPECS["m2"])
    expected = linear(x, fragments(q))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(linear)(x, fragments(q)), expected)


def test_what_it_is_not_for_is_said(monkeypatch):
    params = {"kernel": jax.random.normal(jax.random.key(0), (300, 70))}
    for tree in (params, *(fpq.quantize_params(params, fpq.Recipe.load(n)) for n in ("w8a8-fp", "w4a8-int"))):
        with pytest.raises(FpqError, match="No weight here is for the kernel"):
            fpq.expand_params(tree, "fragments")
    small = fpq.quantize_params(params, M2)

    class Other:
        platform, device_kind, compute_capability = "gpu", "NVIDIA A100", "8.0"

    monkeypatch.setattr(matmul_module.jax, "devices", lambda: [Other()])
    with pytest.raises(
        FpqError, match=r"for Hopper \(H100, H200\), and this is NVIDIA A100; use weights fp8 or packed"
    ):
        fpq.expand_params(small, "fragments")


def test_no_tokens_and_the_smallest_weight():
    x, q = operands(3, 1, 1, SPECS["m2"])
    f = fragments(q)
    close(linear(x, f), exact(x, q))
    assert linear(x[:0], f).shape == (0, 1)
    assert np.isnan(linear(x.at[1].set(jnp.nan), f)).tolist() == [[False], [True], [False]]

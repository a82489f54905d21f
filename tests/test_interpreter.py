"""Structures of functions in combination: what is recorded against NumPy, and what is computed against ``linear``."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fpq_jax as fpq
from fpq_jax._transform.axis_layout import to_kernel

AS_THEY_ARE = fpq.Recipe.load("w4a16-fp")
M2 = fpq.QuantSpec(constraint="m2", group_size=4)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


W, V = _normal(1, 12, 12) / 3, _normal(2, 12, 12) / 3
S, T = _normal(3, 3, 12, 12) / 3, _normal(4, 3, 2, 12, 12) / 3
X = _normal(5, 6, 12)


def gram(*inputs):
    return sum(np.einsum("ni,nj->ij", *[np.asarray(x, np.float64).reshape(-1, 12)] * 2) for x in inputs)


def seen(multiply, apply, params, *args):
    """x^T x of each kernel as ``apply`` runs eagerly, its products being ``multiply(path, index, x)``."""
    met = {}

    def record(key, x):
        met.setdefault(key, []).append(x)
        return x @ multiply(key)

    apply(record, *args)
    return {key: gram(*inputs) for key, inputs in met.items()}


def shared_with_a_scan_and_used_again(dot, x):
    for i in range(3):
        h = jnp.tanh(dot(("s", i), x) + dot(("v",), x))
        x = jnp.tanh(dot(("v",), h) + dot(("s", i), h))
    return x


def indexed_in_a_scan(dot, x):
    for i in range(3):
        x = jnp.tanh(dot(("t", i, 1), jnp.tanh(dot(("t", i, 0), x))))
    return x


def asked_in_a_condition(dot, x):
    for _ in range(3):
        dot(("w",), x)
        x = jnp.tanh(dot(("w",), x))
    dot(("w",), x)  # the condition is asked once more
    return x


def by_scan(p, x):
    def step(c, w):
        h = jnp.tanh(c @ w + c @ p["v"])
        return jnp.tanh(h @ p["v"] + h @ w), None

    return jax.lax.scan(step, x, p["s"])[0]


def by_while(p, x):
    goes_on = lambda s: (s[0] < 3) & (jnp.sum(s[1] @ p["w"]) < 1e9)
    return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]


CASES = {
    "a kernel that shares with a scanned one and is used again": (by_scan, shared_with_a_scan_and_used_again),
    "a stack indexed inside of a scan over another of its axes": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(jnp.tanh(c @ w[0]) @ w[1]), None), x, p["t"])[0],
        indexed_in_a_scan,
    ),
    "the condition of a loop": (by_while, asked_in_a_condition),
}


@pytest.mark.parametrize("name", CASES)
def test_records_of_structures_in_one_another(name):
    apply, by_hand = CASES[name]
    params = {"w": W, "v": V, "s": S, "t": T}
    weight = lambda key: params[key[0]][key[1:]] if key[1:] else params[key[0]]
    wanted = seen(weight, by_hand, params, X)
    used = {key: params[key] for key in {path for path, *_ in wanted}}
    found = fpq.collect_hessians(apply, used, [X], AS_THEY_ARE)
    for (path, *index), matrix in wanted.items():
        got = found[path][tuple(index)] if index else found[path]
        np.testing.assert_allclose(got, matrix, rtol=1e-4, atol=1e-4 * np.abs(matrix).max())


def test_two_stacks_of_one_input_one_of_which_sees_all_of_it():
    x = _normal(6, 3, 5, 12)
    own = lambda p, x: jnp.einsum("eti,eio->eto", x, p["a"]) + jnp.einsum("eti,eio->eto", 2 * x, p["b"])
    every = lambda p, x: jnp.einsum("ati,eio->aeto", x, p["b"])
    found = fpq.collect_hessians(lambda p, x: (own(p, x), every(p, x)), {"a": S, "b": S}, [x], AS_THEY_ARE)
    np.testing.assert_allclose(found["a"], [gram(x[i]) for i in range(3)], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["b"], [gram(2 * x[i], x) for i in range(3)], rtol=1e-4, atol=1e-3)


def test_batches_in_which_other_kernels_share():
    apply = lambda p, x: (x @ p["q"], x[-4:] @ p["k"])  # a window of four
    batches = [_normal(1, 4, 12), _normal(2, 6, 12), _normal(3, 4, 12)]
    found = fpq.collect_hessians(apply, {"q": W, "k": W}, batches, AS_THEY_ARE)
    np.testing.assert_allclose(found["q"], gram(*batches), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["k"], gram(*(x[-4:] for x in batches)), rtol=1e-4, atol=1e-3)


class Rematerialized(nnx.Module):
    """nnx.remat gives its module's state back."""

    def __init__(self, rngs):
        self.inner, self.head = nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    @nnx.remat
    def body(self, x):
        return x + self.inner(x)

    def __call__(self, x):
        return self.head(self.body(x))


def test_parameters_that_remat_gives_back_are_parameters_still():
    graph, params = nnx.split(Rematerialized(nnx.Rngs(0)))
    apply = lambda params, x: nnx.merge(graph, params)(x)
    small = fpq.quantize_params(
        params, fpq.Recipe.load("w4a8-fp-m2"), fpq.collect_hessians(apply, params, [X], AS_THEY_ARE)
    )
    got = jax.jit(fpq.quantized(apply, strict=True))(small, X)
    inner, head = (small[name]["kernel"].get_value() for name in ("inner", "head"))
    np.testing.assert_allclose(got, fpq.linear(X + fpq.linear(X, inner), head), rtol=1e-5, atol=1e-5)


def _stacked(w, kinds, spec=M2):
    axes = fpq.Axes.of(kinds.split(), w.shape, w.dtype)
    one = lambda w: fpq.quantize_array(w, spec)
    kernel = to_kernel(w, axes)
    for _ in kernel.shape[:-2]:
        one = jax.vmap(one)
    return replace(one(kernel), axes=axes)


def test_each_kernels_own_static_scale_behind_calls():
    """Kernels that are made anew inside of a call, with scales of their own for one input."""
    spec = fpq.QuantSpec(format="e4m3", group_size="channel", activation_scale="static")
    scales = {f"k{i}": jnp.float32([0.01 * 2**i]) for i in range(8)}
    kernels = {name: replace(fpq.quantize_array(W, spec), input_scale=scale) for name, scale in scales.items()}
    call = jax.jit(lambda w, x: x @ jax.lax.optimization_barrier(w))
    got = jax.jit(fpq.quantized(lambda p, x: {name: call(w, x) for name, w in p.items()}))(kernels, X)
    for name, q in kernels.items():
        np.testing.assert_allclose(got[name], fpq.linear(X, q), rtol=1e-5, atol=1e-6)


def test_the_precision_of_a_product_is_kept():
    q = _stacked(W, "in out")

    def apply(w, x):
        with jax.default_matmul_precision("highest"):
            return x @ w

    lines = jax.jit(fpq.quantized(apply)).lower(q, X).as_text().splitlines()
    (dot,) = [line for line in lines if "dot_general" in line and "f8E4M3FN" in line]
    assert "HIGHEST" in dot


def test_a_function_that_many_layers_call_is_traced_once():
    traced = []

    @jax.jit
    def block(w, x):
        traced.append(1)
        for _ in range(3):
            x = jnp.tanh(x @ w) * 1.5 + jnp.sin(x) - jnp.cos(x)
        return x

    params = [_stacked(_normal(i, 12, 12), "in out") for i in range(16)]

    def apply(params, x):
        for w in params:
            x = block(w, x)
        return x

    lowered = jax.jit(fpq.quantized(apply, strict=True)).lower(params, X)
    assert sum("dot_general" in line and "f8E4M3FN" in line for line in lowered.as_text().splitlines()) == 3
    assert len(traced) == 1
    expected = X
    for q in params:
        for _ in range(3):
            expected = jnp.tanh(fpq.linear(expected, q)) * 1.5 + jnp.sin(expected) - jnp.cos(expected)
    # a sum in another order moves a code of an activation now and then, and 48 products follow one another
    got = np.asarray(lowered.compile()(params, X))
    assert np.isfinite(got).all() and np.median(np.abs(got - expected)) < 1e-3


def test_a_function_called_with_other_arguments_quantized():
    """One call has a kernel where another has an array; and a function that gives its kernel back."""

    @jax.jit
    def block(w, v, x):
        for _ in range(3):
            x = jnp.tanh(x @ w) + jnp.sin(x @ v) - jnp.cos(x)
        return x, w.T

    def apply(p, x):
        x, moved = block(p["v"], p["w"], x)
        x, _ = block(p["w"], p["v"], x)
        x, _ = block(p["w"], moved.T, x)
        return x

    params = {"w": _stacked(W, "in out"), "v": V}
    by_hand = lambda dot, w, v, x: jnp.tanh(dot(x, w)) + jnp.sin(dot(x, v)) - jnp.cos(x)
    expected = X
    for w, v in ((V, params["w"]), (params["w"], V), (params["w"], V)):
        for _ in range(3):
            expected = by_hand(fpq.linear, w, v, expected)
    got = jax.jit(fpq.quantized(apply, strict=True))(params, X)
    assert bool(jnp.isfinite(expected).all())
    assert np.median(np.abs(got - expected)) < 1e-3


def test_kernels_put_on_a_device_inside_of_the_function():
    q, p = _stacked(W, "in out"), _stacked(V, "in out")
    got = jax.jit(fpq.quantized(lambda w, x: x @ jax.device_put(w), strict=True))(q, X)
    np.testing.assert_allclose(got, fpq.linear(X, q), rtol=1e-5, atol=1e-5)
    several = fpq.quantized(lambda p, x: [x @ w for w in jax.device_put(p)])
    for out, one in zip(jax.jit(several)([q, p], X), (q, p), strict=True):
        np.testing.assert_allclose(out, fpq.linear(X, one), atol=0.1)


def test_linen_layers_that_are_scanned_mapped_and_rematerialized_together():
    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(12, name="down")(nn.relu(nn.Dense(24, name="up")(x)))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            experts = nn.vmap(Expert, {"params": 0}, {"params": True}, in_axes=None, axis_size=2)
            return x + experts()(x).mean(0), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
            return nn.scan(nn.remat(Layer), **over)()(x, None)[0]

    model = Model()
    params = model.init(jax.random.key(0), X)
    hessians = fpq.collect_hessians(model.apply, params, [X], AS_THEY_ARE)
    second, first = sorted(hessians)
    (inner,) = params["params"].values()
    (inner,) = inner.values()
    x = X
    for i in range(3):
        np.testing.assert_allclose(hessians[first][i], gram(x), rtol=1e-4, atol=1e-3)  # of both experts
        outputs = []
        for e in range(2):
            h = jax.nn.relu(x @ inner["up"]["kernel"][i, e] + inner["up"]["bias"][i, e])
            wanted = np.asarray(h, np.float64).T @ np.asarray(h, np.float64)
            np.testing.assert_allclose(hessians[second][i, e], wanted, rtol=1e-3, atol=1e-3)
            outputs.append(h @ inner["down"]["kernel"][i, e] + inner["down"]["bias"][i, e])
        x = x + sum(outputs) / 2
    small = fpq.quantize_params(params, AS_THEY_ARE, hessians)
    got = jax.jit(fpq.quantized(model.apply, strict=True))(small, X)
    np.testing.assert_allclose(got, model.apply(fpq.dequantize_params(small), X), rtol=1e-4, atol=1e-4)

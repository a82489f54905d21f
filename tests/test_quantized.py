"""Other people's functions on QTensors, against ``linear`` placed by hand."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpq_jax as fpq
from fpq_jax import debug
from fpq_jax._transform.axis_layout import to_kernel

M2 = fpq.QuantSpec(constraint="m2", group_size=16)


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@partial(jax.jit, static_argnums=(1, 2, 3))
def quantize(w, kinds, spec=M2, rank=0):
    """A parameter whose axes are ``kinds`` as a QTensor."""
    axes = fpq.Axes.of(kinds.split(), w.shape, w.dtype)

    def one(w):
        q = fpq.quantize_array(w, spec)
        return fpq.lorc(w, q, rank=rank) if rank else q

    kernel = to_kernel(w, axes)
    for _ in kernel.shape[:-2]:
        one = jax.vmap(one)
    return replace(one(kernel), axes=axes)


def index(q, i):
    """One weight of a stack."""
    return jax.tree.map(lambda a: a[i], q)


LINEAR = fpq.linear
# (function, shape of the kernel, its axes, the same with linear by hand, FP8 products)
X = (2, 5, 32)
CASES = {
    "matmul": (lambda w, x: x @ w, (32, 24), "in out", lambda q, x: LINEAR(x, q), 1),
    "jnp.dot": (lambda w, x: jnp.dot(x, w), (32, 24), "in out", lambda q, x: LINEAR(x, q), 1),
    "tensordot": (
        lambda w, x: jnp.tensordot(x, w, axes=1),
        (32, 4, 6),
        "in out out",
        lambda q, x: LINEAR(x, q).reshape(2, 5, 4, 6),
        1,
    ),
    "transposed": (lambda w, x: x @ w.T, (24, 32), "out in", lambda q, x: LINEAR(x, q), 1),
    "kernel first": (
        lambda w, x: jax.vmap(jax.vmap(lambda v: w @ v))(x),
        (24, 32),
        "out in",
        lambda q, x: LINEAR(x, q),
        1,
    ),
    "kernel first, outputs in front": (
        lambda w, x: jnp.einsum("oi,bti->obt", w, x),
        (24, 32),
        "out in",
        lambda q, x: jnp.moveaxis(LINEAR(x, q), -1, 0),
        1,
    ),
    "lax.dot_general": (
        lambda w, x: jax.lax.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32),
        (32, 24),
        "in out",
        lambda q, x: LINEAR(x, q),
        1,
    ),
    "heads out": (
        lambda w, x: jnp.einsum("btd,dnh->bnth", x, w),
        (32, 3, 8),
        "in out out",
        lambda q, x: LINEAR(x, q).reshape(2, 5, 3, 8).swapaxes(1, 2),
        1,
    ),
    "heads in front": (
        lambda w, x: jnp.einsum("btd,ndh->btnh", x, w),
        (3, 32, 8),
        "out in out",
        lambda q, x: LINEAR(x, q).reshape(2, 5, 3, 8),
        1,
    ),
    "heads in": (
        lambda w, x: jnp.einsum("btnh,nhd->btd", x.reshape(2, 5, 4, 8), w),
        (4, 8, 12),
        "in in out",
        lambda q, x: LINEAR(x, q),
        1,
    ),
    "heads in, in another order": (
        lambda w, x: jnp.einsum("bthn,nhd->btd", x.reshape(2, 5, 8, 4), w),
        (4, 8, 12),
        "in in out",
        lambda q, x: LINEAR(x.reshape(2, 5, 8, 4).swapaxes(2, 3).reshape(2, 5, 32), q),
        1,
    ),
    "reshaped and cast": (
        lambda w, x: (x.astype(jnp.bfloat16).reshape(10, 32) @ w.astype(jnp.bfloat16).reshape(32, -1)).reshape(
            2, 5, 24
        ),
        (32, 4, 6),
        "in out out",
        lambda q, x: LINEAR(x.astype(jnp.bfloat16), q),
        1,
    ),
    "experts": (
        lambda w, x: jnp.einsum("btd,bdo->bto", x, w),
        (2, 32, 12),
        "stack in out",
        lambda q, x: jnp.stack([LINEAR(x[i], index(q, i)) for i in range(2)]),
        1,
    ),
    "experts of one input": (
        lambda w, x: jnp.einsum("btd,edo->bteo", x, w),
        (3, 32, 12),
        "stack in out",
        lambda q, x: jnp.stack([LINEAR(x, index(q, i)) for i in range(3)], axis=2),
        1,
    ),
    "vmap over kernels": (
        lambda w, x: jax.vmap(jnp.matmul)(x, w),
        (2, 32, 12),
        "stack in out",
        lambda q, x: jnp.stack([LINEAR(x[i], index(q, i)) for i in range(2)]),
        1,
    ),
    "vmap over inputs": (
        lambda w, x: jax.vmap(lambda x: x @ w, in_axes=1, out_axes=1)(x),
        (32, 12),
        "in out",
        lambda q, x: LINEAR(x, q),
        1,
    ),
    "scan": (
        lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c[0, 0]), x, w, reverse=True),
        (3, 32, 32),
        "stack in out",
        lambda q, x: jax.lax.scan(lambda c, q: (jnp.tanh(LINEAR(c, q)), c[0, 0]), x, q, reverse=True),
        1,
    ),
    "scan over another axis": (
        lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.moveaxis(w, 1, 0))[0],
        (32, 3, 32),
        "in stack out",
        lambda q, x: jax.lax.scan(lambda c, q: (jnp.tanh(LINEAR(c, q)), None), x, q)[0],
        1,
    ),
    "scan over the second of two stacks": (
        lambda w, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(jnp.einsum("bti,bio->bto", c, w)), None), x, jnp.moveaxis(w, 1, 0)
        )[0],
        (2, 3, 32, 32),
        "stack stack in out",
        lambda q, x: jnp.stack(
            [jax.lax.scan(lambda c, q: (jnp.tanh(LINEAR(c, q)), None), x[i], index(q, i))[0] for i in range(2)]
        ),
        1,
    ),
    "closed over by a scan": (
        lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0],
        (32, 32),
        "in out",
        lambda q, x: jax.lax.scan(lambda c, _: (jnp.tanh(LINEAR(c, q)), None), x, None, length=3)[0],
        1,
    ),
    "fori_loop over a stack": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x),
        (3, 32, 32),
        "stack in out",
        lambda q, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(LINEAR(c, index(q, i))), x),
        1,
    ),
    "while": (
        lambda w, x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x)),
        (32, 32),
        "in out",
        lambda q, x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(LINEAR(s[1], q))), (0, x)),
        1,
    ),
    "cond": (
        lambda w, x: jax.lax.cond(x[0, 0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, w),
        (32, 24),
        "in out",
        lambda q, x: jax.lax.cond(x[0, 0, 0] > 0, lambda q: LINEAR(x, q), lambda q: LINEAR(-x, q), q),
        2,
    ),
    "layers of a list": (
        lambda w, x: jnp.tanh(x @ w[0]) @ w[2],
        (3, 32, 32),
        "stack in out",
        lambda q, x: LINEAR(jnp.tanh(LINEAR(x, index(q, 0))), index(q, 2)),
        2,
    ),
    "unstacked": (
        lambda w, x: jnp.tanh(x @ jnp.unstack(w)[1]) @ jnp.split(w, 3)[2][0],
        (3, 32, 32),
        "stack in out",
        lambda q, x: LINEAR(jnp.tanh(LINEAR(x, index(q, 1))), index(q, 2)),
        2,
    ),
    "remat": (
        jax.checkpoint(lambda w, x: jnp.tanh(x @ w)),
        (32, 24),
        "in out",
        lambda q, x: jnp.tanh(LINEAR(x, q)),
        1,
    ),
    "jit inside": (
        lambda w, x: jax.jit(lambda w: jax.jit(lambda a: a @ w)(x))(w),
        (32, 24),
        "in out",
        lambda q, x: LINEAR(x, q),
        1,
    ),
}


@jax.custom_vjp
def doubled(x):
    return x * 2


doubled.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 5,))


@jax.custom_jvp
def product(x, w):
    return x @ w


product.defjvp(lambda primals, tangents: (product(*primals), product(tangents[0], primals[1])))
CASES |= {
    "a custom derivative behind it": (
        lambda w, x: doubled(x @ w),
        (32, 24),
        "in out",
        lambda q, x: doubled(LINEAR(x, q)),
        1,
    ),
    "a custom derivative of it": (lambda w, x: product(x, w), (32, 24), "in out", lambda q, x: LINEAR(x, q), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_a_product_is_linear(name):
    function, shape, kinds, by_hand, dots = CASES[name]
    q, x = quantize(_normal(1, *shape) / 4, kinds), _normal(2, *X)
    lowered = jax.jit(fpq.quantized(function, strict=True)).lower(q, x)
    assert sum("dot_general" in line and "f8E4M3FN" in line for line in lowered.as_text().splitlines()) == dots
    got, expected = lowered.compile()(q, x), by_hand(replace(q, axes=None), x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)
    like = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(lambda a: (a.shape, a.dtype), like)


@pytest.mark.parametrize(
    "spec",
    [
        fpq.QuantSpec(format="e4m3", group_size="channel"),
        fpq.QuantSpec(group_size=16),
        fpq.QuantSpec(format="int8-asym", group_size="channel", activation="int8-asym"),
        fpq.QuantSpec(format="int4", group_size="tensor", activation="int8"),
        fpq.QuantSpec(constraint="m1", group_size=12, activation=None),
    ],
    ids=str,
)
def test_every_kind_of_qtensor_with_lorc(spec):
    w, x = _normal(3, 3, 32, 24), _normal(4, 6, 32)
    q = quantize(w, "stack in out", spec, rank=4)
    got = jax.jit(fpq.quantized(lambda w, x: jnp.einsum("td,edo->eto", x, w), strict=True))(q, x)
    expected = jnp.stack([fpq.linear(x, index(replace(q, axes=None), i)) for i in range(3)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_another_use_is_dequantized_told_once_and_refused_if_strict():
    q, x = quantize(_normal(1, 24, 32), "out in"), _normal(2, *X)
    tied = lambda params, x: (x @ params["table"].T, params["table"][jnp.array([3, 5])], jnp.abs(params["table"]))
    run = fpq.quantized(tied)
    with pytest.warns(UserWarning, match=r"table is used in a way that has no quantized form \(gather\)") as told:
        logits, rows, absolute = jax.jit(run)({"table": q}, x)
    assert len(told) == 2  # gather and abs
    dense = fpq.dequantize(replace(q, axes=None)).T
    np.testing.assert_array_equal(rows, dense[jnp.array([3, 5])])
    np.testing.assert_array_equal(absolute, jnp.abs(dense))
    np.testing.assert_allclose(logits, fpq.linear(x, q), rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run({"table": q}, x)
    with pytest.raises(fpq.FpqError, match="table is used in a way that has no quantized form"):
        fpq.quantized(tied, strict=True)({"table": q}, x)


def test_products_over_outputs_and_kernels_of_each_other_are_dequantized():
    q, p = quantize(_normal(1, 32, 24), "in out"), quantize(_normal(2, 24, 16), "in out")
    with pytest.warns(UserWarning, match="dot_general"):
        got = fpq.quantized(lambda q, x: x @ q.T)(q, _normal(3, 4, 24))
    np.testing.assert_allclose(got, _normal(3, 4, 24) @ fpq.dequantize(q).T, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match=r"argument 1 .*a product with another parameter"):
        got = fpq.quantized(lambda q, p: q @ p)(q, p)
    np.testing.assert_allclose(got, fpq.dequantize(q) @ fpq.dequantize(p), rtol=1e-5, atol=1e-5)


def test_arguments_that_are_no_arrays_stay_and_parameters_come_back():
    q, x = quantize(_normal(1, 32, 24), "in out"), _normal(2, 4, 32)

    def apply(params, x, train, *, name):
        assert train is False and name == "eval" and params["activation"] is jnp.tanh
        return {"y": params["activation"](x @ params["kernel"]), "params": params, "moved": params["kernel"].T, "n": 3}

    params = {"kernel": q, "activation": jnp.tanh}
    with pytest.warns(UserWarning, match="a result"):
        out = fpq.quantized(apply)(params, x, False, name="eval")  # and outside of jit
    assert out["n"] == 3 and out["params"]["activation"] is jnp.tanh
    assert isinstance(out["params"]["kernel"], fpq.QTensor)
    jax.tree.map(np.testing.assert_array_equal, out["params"]["kernel"], q)
    np.testing.assert_array_equal(out["moved"], fpq.dequantize(q).T)
    # without QTensors it is the function itself
    assert fpq.quantized(lambda a: (a, isinstance(a, np.ndarray)))(np.ones(3))[1]


def test_an_input_that_several_kernels_see_is_quantized_once():
    params = {name: quantize(_normal(i, 32, 24), "in out") for i, name in enumerate("qkv")}

    def apply(params, x):
        return [x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16) for w in params.values()]

    text = jax.jit(fpq.quantized(apply)).lower(params, _normal(9, 4, 32)).as_text()
    assert sum("optimization_barrier" in line for line in text.splitlines()) == 1


def test_gradients_flow_to_inputs_unquantized_leaves_and_factors():
    w, x = _normal(1, 32, 24), _normal(2, 6, 32)
    params = {"kernel": quantize(w, "in out", rank=4), "bias": _normal(3, 24)}
    apply = lambda params, x: jnp.sum(jnp.sin(x @ params["kernel"] + params["bias"]))
    trained, rest = fpq.partition(params, "all")
    run = lambda trained, x: fpq.quantized(apply)(fpq.combine(trained, rest), x)
    gradient, by_x = jax.jit(jax.grad(run, argnums=(0, 1)))(trained, x)
    y = jnp.cos(fpq.linear(x, params["kernel"]) + params["bias"])
    a, b = (np.asarray(f, np.float32) for f in (params["kernel"].low_rank.a, params["kernel"].low_rank.b))
    close = lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())
    close(by_x, y @ fpq.dequantize(params["kernel"]).T)
    close(gradient["bias"], y.sum(0))
    close(gradient["kernel"].a, x.T @ (y @ b.T))
    close(gradient["kernel"].b, (x @ a).T @ y)
    # through scan and remat too
    stacked = quantize(_normal(4, 2, 32, 32) / 6, "stack in out", rank=2)
    deep = lambda w, x: jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, w)[0].sum()
    by_hand = lambda q, x: fpq.linear(jnp.tanh(fpq.linear(x, index(q, 0))), index(q, 1))
    got = jax.grad(lambda x: fpq.quantized(deep)(stacked, x))(x)
    wanted = jax.grad(lambda x: jnp.tanh(by_hand(replace(stacked, axes=None), x)).sum())(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_the_compiled_program_is_the_one_of_linear_by_hand(hopper_compiler):
    """For an H100: our LLaMA, whose layers call ``linear``, by the general road and by its own."""
    from flax import nnx

    from fpq_jax.models.llama import Llama, LlamaConfig

    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    more |= {"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = LlamaConfig.from_hf(sizes | more)
    graph, params = nnx.split(Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    apply, tokens = lambda params, tokens: nnx.merge(graph, params)(tokens), jnp.zeros((1, 64), int)
    uses = fpq.find_kernels(apply, params, tokens)
    recipe = fpq.Recipe.load("w4a8-fp-m2-lorc").with_rule("lm_head*", quantize=False)
    small = fpq.expand_params(fpq.quantize_params(params, recipe, uses=uses))
    general, own = (debug.compile_for_hopper(f, small, tokens) for f in (fpq.quantized(apply), apply))
    assert str(general) == str(own)
    assert sorted(map(str, general.launches)) == sorted(map(str, own.launches)) and "FP8 products" in str(own)


@pytest.mark.full
def test_stacked_weights_are_fp8_products_on_an_h100(hopper_compiler):
    spec = fpq.QuantSpec(constraint="m2", group_size=64)
    x = jnp.ones((4, 64, 128), jnp.bfloat16)
    experts = quantize(_normal(1, 4, 128, 256).astype(jnp.bfloat16), "stack in out", spec)
    program = debug.compile_for_hopper(fpq.quantized(lambda w, x: jnp.einsum("etd,edf->etf", x, w)), experts, x)
    assert "1 FP8 products, 0 other products" in str(program)
    layers = quantize(_normal(2, 3, 128, 128).astype(jnp.bfloat16), "stack in out", spec)
    scan = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    assert "1 FP8 products, 0 other products" in str(debug.compile_for_hopper(fpq.quantized(scan), layers, x[0]))


@pytest.mark.full
def test_tracing_costs_at_most_three_times_as_much():
    """A transformer of 32 layers; processor time, the least of several."""
    import time

    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.RMSNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(h, h)
            h = nn.RMSNorm()(x)
            return x + nn.Dense(32)(nn.silu(nn.Dense(64)(h)) * nn.Dense(64)(h))

    model, x = nn.Sequential([Block() for _ in range(32)]), jnp.zeros((2, 8, 32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    uses = fpq.find_kernels(model.apply, shapes, x)
    assert sum(not use.reason for use in uses.values()) == 32 * 7
    recipe = fpq.Recipe.load("w4a8-fp-m2")
    small = jax.eval_shape(lambda p: fpq.quantize_params(p, recipe, uses=uses), shapes)

    def seconds(function, params):
        jax.clear_caches()
        began = time.process_time()
        jax.jit(function).trace(params, x)
        return time.process_time() - began

    runs = [(seconds(model.apply, shapes), seconds(fpq.quantized(model.apply), small)) for _ in range(3)]
    original, quantized = map(min, zip(*runs, strict=True))
    assert quantized < 3 * original

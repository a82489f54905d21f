"""The engine of calibration: sums with their counts, part by part, beside a reference, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpq_jax as fpq
from fpq_jax._numerics.activations import fake_quantize_tokens
from fpq_jax._numerics.qtensor import Axes
from fpq_jax._transform.accumulate import record_stats
from fpq_jax._transform.recorder import RecordedKernel, Recorder

SPEC = fpq.QuantSpec(constraint="m2", group_size=16)
WIDTH = 24


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {name: draw(i, WIDTH, WIDTH) / 5 for i, name in enumerate(("q", "k", "out", "up"))}
BATCHES = [(draw(10 + i, 3, 5, WIDTH), jnp.asarray([1, 1, 0], bool)) for i in range(2)]
OTHERS = [(x + 0.3 * draw(20 + i, *x.shape), real) for i, (x, real) in enumerate(BATCHES)]
AXES = Axes.of(("in", "out"), (WIDTH, WIDTH), jnp.float32)


def apply(params, x, real):
    """Two kernels of one input, one behind them, one behind that; they multiply QTensors by themselves."""
    inner = fpq.linear(x, params["q"]) * jnp.tanh(fpq.linear(x, params["k"]))
    return fpq.linear(jax.nn.relu(fpq.linear(inner, params["out"])), params["up"])


def mask(x, real):
    return jnp.broadcast_to(real[:, None], x.shape[:2])


def recorded(params, names, spec=SPEC, batches=BATCHES, reference=None):
    kernels = {name: RecordedKernel.of(AXES, spec) for name in names}
    recorder, arrays = Recorder.of(apply, params, kernels, mask, knows_qtensors=True)
    if reference is not None:
        reference = (*Recorder.of(apply, reference, kernels, mask, knows_qtensors=True), OTHERS)
    return record_stats(recorder, arrays, batches, static_batches=lambda: batches, reference=reference)


def rows(xs):
    """What counts of the batches, float64."""
    return np.concatenate([np.asarray(x[:2], np.float64).reshape(-1, WIDTH) for x in xs])


def gram(x, y):
    return x.T @ y


def test_sums_and_counts_of_what_the_mask_lets_count():
    found = recorded(PARAMS, ["q", "k", "out"])
    assert list(found.inputs) == [("q", "k"), ("out",)]
    x = rows(fake_quantize_tokens(x, fpq.E4M3) for x, _ in BATCHES)
    np.testing.assert_allclose(found.of("k").hessian, gram(x, x), rtol=1e-5, atol=1e-4)
    assert {int(one.count) for one in found.inputs.values()} == {20} and found.of("q").cross is None


def test_a_kernel_behind_quantized_ones_sees_what_inference_will_give_it():
    small = PARAMS | {name: fpq.quantize_array(PARAMS[name], SPEC) for name in "qk"}
    found = recorded(small, ["out"])
    inner = lambda x: fpq.linear(x, small["q"]) * jnp.tanh(fpq.linear(x, small["k"]))
    x = rows(fake_quantize_tokens(inner(x), fpq.E4M3) for x, _ in BATCHES)
    np.testing.assert_allclose(found.of("out").hessian, gram(x, x), rtol=1e-4, atol=1e-4)
    with_arrays = recorded(PARAMS, ["out"]).of("out").hessian
    assert np.abs(found.of("out").hessian - with_arrays).max() > 1e-2 * np.abs(with_arrays).max()


@pytest.mark.parametrize("scale", ["token", "static"])
def test_a_reference_is_compared_with_in_full_precision_on_a_stream_of_its_own(scale):
    spec = fpq.QuantSpec(constraint="m2", group_size=16, activation_scale=scale)
    small = PARAMS | {name: fpq.quantize_array(PARAMS[name], SPEC) for name in "qk"}
    found = recorded(small, ["out"], spec, reference=PARAMS)
    inner = lambda p, x: fpq.linear(x, p["q"]) * jnp.tanh(fpq.linear(x, p["k"]))
    plain = [inner(small, x) for x, _ in BATCHES]
    static = found.static_scales.get("out")
    assert (static is None) == (scale == "token")
    if static is not None:
        np.testing.assert_allclose(static.scale, [max(float(jnp.abs(x).max()) for x in plain) / 448], rtol=1e-6)
    x = rows(fake_quantize_tokens(x, fpq.E4M3, static) for x in plain)
    r = rows(inner(PARAMS, x) for x, _ in OTHERS)
    np.testing.assert_allclose(found.of("out").hessian, gram(x, x), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.of("out").cross, gram(x, r - x), rtol=1e-4, atol=1e-3)
    assert np.abs(found.of("out").cross).max() > 1


def test_each_kernel_of_a_stack_has_its_count():
    stack = {"w": draw(1, 3, WIDTH, WIDTH)}
    axes = Axes.of(("stack", "in", "out"), (3, WIDTH, WIDTH), jnp.float32)
    scan = lambda p, x, real: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    taken = lambda p, x, real: jnp.stack([x @ p["w"][0], x @ p["w"][2]])
    for function, counts in ((scan, [20, 20, 20]), (taken, [20, 0, 20])):
        made = Recorder.of(function, stack, {"w": RecordedKernel.of(axes, SPEC)}, mask)
        found = record_stats(*made, BATCHES).of("w")
        assert found.hessian.shape == (3, WIDTH, WIDTH) and found.count.tolist() == counts


def test_of_a_product_with_a_form_for_one_platform_the_others_is_recorded():
    """Whatever shape the input has there."""

    def flat(x, w):
        return (x.reshape(-1, WIDTH) @ w).reshape(x.shape)

    def own(params, x, real):
        y = jax.lax.platform_dependent(x, params["q"], cpu=flat, default=jnp.matmul)
        return jnp.tanh(y) @ params["out"]

    kernels = {name: RecordedKernel.of(AXES, SPEC) for name in ("q", "out")}
    of = lambda function: record_stats(
        *Recorder.of(function, PARAMS, kernels, mask), BATCHES, static_batches=lambda: BATCHES
    )
    plain = of(lambda params, x, real: jnp.tanh(x @ params["q"]) @ params["out"])
    found = of(own)
    for name in kernels:
        np.testing.assert_allclose(found.of(name).hessian, plain.of(name).hessian, rtol=1e-5, atol=1e-5)
        assert int(found.of(name).count) == 20


def test_inputs_of_loops_and_stacks_cannot_be_compared():
    stack = {"w": draw(1, 3, WIDTH, WIDTH)}
    axes = Axes.of(("stack", "in", "out"), (3, WIDTH, WIDTH), jnp.float32)
    scan = lambda p, x, real: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    twice = lambda p, x, real: x @ p["q"] @ p["q"]
    for function, params, name, own in ((scan, stack, "w", axes), (twice, PARAMS, "q", AXES)):
        made = Recorder.of(function, params, {name: RecordedKernel.of(own, SPEC)}, mask)
        with pytest.raises(fpq.FpqError, match=r"cannot be compared with a reference's"):
            record_stats(*made, BATCHES, reference=(*made, OTHERS))


def test_equal_layers_are_compiled_once():
    """As those of a model, and those of other recipes with the same activations."""
    from fpq_jax._transform.accumulate import accumulate

    recorded(PARAMS, ["q"])
    compiled = accumulate._cache_size()
    recorded({name: -w for name, w in PARAMS.items()}, ["q"], fpq.QuantSpec(format="int4", group_size=8))
    assert accumulate._cache_size() == compiled

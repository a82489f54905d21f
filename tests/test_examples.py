"""The examples as a user runs them, and against ``linear`` placed by hand in their models' layers."""

import importlib.util
import sys
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fpq_jax as fpq
from fpq_jax._support.trees import named_leaves

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = sorted(f.stem for f in EXAMPLES.glob("*.py") if f.stem != "fine_tune")
is_quantized = lambda leaf: isinstance(leaf, fpq.QTensor)


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _linear_by_hand(monkeypatch):
    """Layers of Flax and Equinox that call ``linear`` where their kernel is a QTensor."""

    def replaced(layer, by_hand, kernel):
        original = layer.__call__

        def call(self, x, *args, **kwargs):
            q = kernel(self)
            return by_hand(self, x, q) if is_quantized(q) else original(self, x, *args, **kwargs)

        monkeypatch.setattr(layer, "__call__", call)

    def general(self, x, q):
        x = x.reshape(*x.shape[: x.ndim - len(self.axis)], -1) if isinstance(self.axis, tuple) else x
        out = self.out_features if isinstance(self.out_features, tuple) else (self.out_features,)
        return fpq.linear(x, q).reshape(*x.shape[:-1], *out) + self.bias.get_value()

    def einsum(self, x, q):  # "btd,dcnh->cbtnh"
        return jnp.moveaxis(fpq.linear(x, q).reshape(*x.shape[:-1], *self.kernel_shape[1:]), 2, 0)

    value = lambda self: self.kernel.get_value()
    replaced(nnx.Linear, lambda self, x, q: fpq.linear(x, q, self.bias.get_value()), value)
    replaced(nnx.LinearGeneral, general, value)
    replaced(nnx.Einsum, einsum, value)
    replaced(eqx.nn.Linear, lambda self, x, q: fpq.linear(x, q, self.bias), lambda self: self.weight)


def _linen_by_hand(call, args, kwargs, context):
    """An interceptor of methods, for Linen."""
    self = context.module
    if context.method_name != "__call__" or not isinstance(self, nn.Dense | nn.DenseGeneral):
        return call(*args, **kwargs)
    q, bias = self.get_variable("params", "kernel"), self.get_variable("params", "bias")
    if not is_quantized(q):
        return call(*args, **kwargs)
    (x,) = args
    x = x.reshape(*x.shape[: x.ndim - (2 if getattr(self, "axis", -1) == (-2, -1) else 1)], -1)
    return fpq.linear(x, q).reshape(*x.shape[:-1], *bias.shape) + bias


def _plain_by_hand(params, tokens):
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = x + fpq.linear(jnp.tanh(fpq.linear(x, layer["mix"])), layer["out"])
        gates = jax.nn.softmax(x @ layer["router"])
        hidden = jax.nn.relu(fpq.linear(x, layer["up"]).reshape(*x.shape[:-1], 4, 32))
        for e in range(4):
            down = jax.tree.map(lambda a: a[e], layer["down"])  # noqa: B023
            x = x + gates[..., e, None] * fpq.linear(hidden[..., e, :], down)
    return x @ params["embedding"].T


def _is_whole(leaf):
    return leaf is None or is_quantized(leaf)


def _either(array, other):
    return other if array is None else array


def test_every_example_is_short():
    assert len(MODELS) == 6
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file


@pytest.mark.parametrize("name", MODELS)
def test_a_model_quantized_is_linear_by_hand(name, monkeypatch):
    example, seen = _load(name), {}
    for function in (fpq.collect_hessians, fpq.quantize_params_with_report):

        def keep(*args, function=function, **kwargs):
            seen[function.__name__] = args, function(*args, **kwargs)
            return seen[function.__name__][1]

        monkeypatch.setattr(fpq, function.__name__, keep)
    monkeypatch.setattr(
        fpq, "quantize_params", lambda *args, **kwargs: fpq.quantize_params_with_report(*args, **kwargs)[0]
    )
    example.main()
    apply, params, batches, _ = seen["collect_hessians"][0]
    small, report = seen["quantize_params_with_report"][1]
    assert len(report.results) > 3
    for result in report.results:  # GPTQ, and of stacks each weight
        assert 0 < result.error < result.rounding_error, result
    kernels = [path for path, leaf in named_leaves(small, is_quantized)[0] if is_quantized(leaf)]
    is_array = lambda leaf: is_quantized(leaf) or hasattr(leaf, "dtype")
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, small, is_leaf=is_quantized)
    static = jax.tree.map(lambda leaf: None if is_array(leaf) else leaf, small, is_leaf=is_quantized)
    whole = lambda arrays: jax.tree.map(_either, arrays, static, is_leaf=_is_whole)
    run = lambda arrays, x: fpq.quantized(apply, strict=True)(whole(arrays), x)
    lowered = jax.jit(run).lower(arrays, batches[0])
    dots = sum("dot_general" in line and "f8E4M3FN" in line for line in lowered.as_text().splitlines())
    assert dots == len(kernels), "one FP8 product for each quantized kernel"
    got = lowered.compile()(arrays, batches[0])
    if name == "penzai_llama":  # has layers of its own; with activations left alone, its dequantized weights are it
        recipe = fpq.Recipe.load("w4a16-fp")
        weights = fpq.quantize_params(params, recipe, uses=fpq.find_kernels(apply, params, batches[0]))
        got = jax.jit(fpq.quantized(apply, strict=True))(weights, batches[0])
        expected = jax.jit(apply)(fpq.dequantize_params(weights), batches[0])
    elif name == "plain_dict":
        expected = jax.jit(_plain_by_hand)(small, batches[0])
    elif name == "linen_transformer":
        with nn.intercept_methods(_linen_by_hand):
            expected = jax.jit(apply)(small, batches[0])
    else:
        _linear_by_hand(monkeypatch)
        monkeypatch.setattr(eqx, "combine", lambda *trees: jax.tree.map(_either, *trees, is_leaf=_is_whole))
        expected = jax.jit(lambda arrays, x: apply(whole(arrays), x))(arrays, batches[0])
    np.testing.assert_allclose(got, expected, atol=2e-3 * float(jnp.abs(expected).max()))


def test_fine_tuning_lowers_perplexity_on_text_that_it_did_not_see(monkeypatch):
    example = _load("fine_tune")
    monkeypatch.setattr(example, "STEPS", 12)  # of its 60, which win back 30 % (docs/your_model.md)
    found = example.main()
    assert found["original"] < found["tuned"] < found["W4A8"]


def test_the_pages_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    page = (EXAMPLES.parent / "docs" / "your_model.md").read_text()
    code, names = page.split("```python\n")[1].split("```")[0], {}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "your_model.md", "exec"), names)
    assert names["logits"].shape == (8, 32, 1000)
    jax.tree.map(np.testing.assert_array_equal, names["again"], names["small"])

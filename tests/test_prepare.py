import gc
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_full

from fpq_jax import FpqError, Generator, QTensor, QuantSpec, load, lorc, prepare, quantize_array, save
from fpq_jax._matmul.fp4_kernel.fragments import Fragments
from fpq_jax.models import prepare as _prepare
from fpq_jax.models.parameters import abstract_model, params_of, with_params
from fpq_jax.models.prepare import prepare_in_place

M2 = QuantSpec(group_size=32, constraint="m2")
W8 = QuantSpec(format="e4m3", group_size="channel")
_quantize = jax.jit(quantize_array, static_argnums=1)


def quantized(model, spec=M2, only="", rank=2):
    params = params_of(model)
    for path, w in params.items():
        if path.startswith("layers.") and path.endswith("kernel") and only in path:
            params[path] = lorc(w, _quantize(w, spec), rank=rank)
    return with_params(model, params)


def logits(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 20)))
    return np.asarray(jax.jit(lambda t: model(t))(tokens))


@pytest.mark.parametrize("folder", ["tiny_llama", *mostly_full(["tiny_opt"], 0)])
@pytest.mark.parametrize(
    "spec", mostly_full([M2, None, QuantSpec(group_size=32), W8], 1), ids=["m2", "none", "free", "w8"]
)
def test_a_prepared_model_gives_what_the_model_gives(request, folder, spec):
    model = load(request.getfixturevalue(folder))
    model = model if spec is None else quantized(model, spec)
    expected = logits(model)
    at_load, in_step = prepare(model, "fp8"), prepare(model, "packed")
    np.testing.assert_allclose(logits(at_load), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(logits(at_load), logits(in_step))
    merged = {path for path in params_of(at_load) if "qkv_proj" in path or "gate_up_proj" in path}
    assert len(merged) == (4 if folder == "tiny_llama" else 2 * 2)  # OPT's have biases
    assert not any("q_proj" in path or "gate_proj" in path for path in params_of(at_load))
    assert at_load.prepared and in_step.prepared and not model.prepared
    bytes_ = [sum(leaf.nbytes for leaf in jax.tree.leaves(params_of(m))) for m in (at_load, in_step)]
    assert bytes_[0] > bytes_[1] if spec == M2 else bytes_[0] == bytes_[1]
    assert at_load.decode_rows == (16 if spec in (M2, W8) else 1)


@pytest.mark.full
def test_a_model_with_our_own_kernel(tiny_llama):
    model = quantized(load(tiny_llama))
    ready = prepare(model, "fragments")
    linears = [leaf for path, leaf in params_of(ready).items() if path.startswith("layers.") and "kernel" in path]
    assert len(linears) == 2 * 4 and all(isinstance(leaf, Fragments) for leaf in linears)
    assert ready.decode_rows == 1 and ready.prepared
    without = lambda leaf: replace(leaf, low_rank=None) if isinstance(leaf, QTensor) else leaf
    plain = {path: without(leaf) for path, leaf in params_of(model).items()}
    assert prepare(with_params(model, plain), "fragments").decode_rows == 2
    expected = logits(prepare(model))
    np.testing.assert_allclose(logits(ready), expected, atol=1e-5 * np.abs(expected).max())
    prompts = [[1, 5, 9], [7]]
    found, others = (Generator(prepare(model, how))(prompts, max_new_tokens=8).tokens for how in ("fragments", "fp8"))
    assert found == others
    again = prepare(ready, "fp8")  # another form of what is there
    np.testing.assert_array_equal(logits(again), expected)
    assert not any(isinstance(leaf, Fragments) for leaf in params_of(again).values()) and again.decode_rows == 16
    for devices in (1, 2):
        mesh = jax.sharding.AbstractMesh((1, devices), ("data", "model"))
        with pytest.raises(FpqError, match="multiplies on one device, without a mesh; use weights fp8 or packed"):
            prepare(model, "fragments", mesh=mesh)
    for other in (load(tiny_llama), quantized(load(tiny_llama), W8)):
        with pytest.raises(FpqError, match="No weight here is for the kernel"):
            prepare(other, "fragments")


def test_linears_of_different_kinds_are_not_merged(tiny_llama):
    model = quantized(load(tiny_llama), only="k_proj")
    expected = logits(model)
    ready = prepare(model)
    assert any("q_proj" in path for path in params_of(ready)) and any("gate_up_proj" in p for p in params_of(ready))
    np.testing.assert_allclose(logits(ready), expected, atol=1e-5 * np.abs(expected).max())


def test_the_model_itself_stays_as_it_is_and_can_be_saved(tiny_llama, tmp_path):
    model = quantized(load(tiny_llama))
    before = jax.tree.leaves(params_of(model))
    ready = prepare(model)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(params_of(model)), strict=True))
    with pytest.raises(FpqError, match="prepared to be run cannot be saved; load it without weights"):
        save(tmp_path / "out", ready)
    assert not (tmp_path / "out").exists()
    save(tmp_path / "out", model)
    np.testing.assert_array_equal(logits(load(tmp_path / "out", weights="packed")), logits(prepare(model, "packed")))
    np.testing.assert_array_equal(logits(prepare(ready)), logits(ready))


def test_an_abstract_model_is_prepared_without_memory(tiny_llama):
    model = quantized(load(tiny_llama))
    abstract = abstract_model(type(model), model.config)
    ready, params = params_of(prepare(model)), params_of(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    got = params_of(prepare(with_params(abstract, shapes)))
    assert jax.tree.structure(got) == jax.tree.structure(ready)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(ready), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_unknown_options_are_said(tiny_llama):
    model = load(tiny_llama)
    for call in (lambda: prepare(model, "now"), lambda: load(tiny_llama, weights="now")):
        with pytest.raises(FpqError, match="weights is 'now'; it must be fp8, packed or fragments"):
            call()
    with pytest.raises(FpqError, match="attention is 'flash'; it must be xla or cudnn"):
        prepare(model, attention="flash")
    assert {m.self_attn.implementation for m in prepare(model, attention="cudnn").layers} == {"cudnn"}


@pytest.mark.full
def test_what_is_replaced_in_place_is_freed_layer_by_layer(tiny_llama):
    model = prepare_in_place(quantized(load(tiny_llama)), "fp8")
    assert model.prepared
    seen = []
    model = quantized(load(tiny_llama))
    held = [weakref.ref(layer.self_attn.q_proj) for layer in model.layers]
    merge = _prepare._merge

    def watched(block, *arguments):
        gc.collect()
        seen.append(sum(ref() is not None for ref in held))
        merge(block, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prepare, "_merge", watched)
        prepare_in_place(model, "fp8")
    assert seen[0] == 2 and seen[-1] <= 1


def test_linears_of_different_formats_are_one_fp8_product(tiny_llama):
    model = quantized(quantized(load(tiny_llama), W8, only="v_proj"), only="q_proj")
    model = quantized(model, QuantSpec(format="nf4", group_size=16, constraint="m2"), only="k_proj")
    expected = logits(model)
    for ready, merged in ((prepare(model), 2), (prepare(model, "packed"), 0)):
        np.testing.assert_allclose(logits(ready), expected, atol=1e-5 * np.abs(expected).max())
        assert sum("qkv_proj" in path for path in params_of(ready)) == merged

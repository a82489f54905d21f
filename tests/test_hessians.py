"""Hessians of any function, against sums of x^T x in float64 of what each kernel is known to meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpq_jax as fpq
from fpq_jax._numerics.activations import fake_quantize_tokens

AS_THEY_ARE = fpq.Recipe.load("w4a16-fp")  # activations are left alone


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def gram(*inputs):
    return sum(np.einsum("ni,nj->ij", *[np.asarray(x, np.float64).reshape(-1, x.shape[-1])] * 2) for x in inputs)


def stack(*parts):
    return np.stack([gram(*part) if isinstance(part, tuple) else gram(part) for part in parts])


W, S = _normal(1, 12, 12) / 3, _normal(2, 3, 12, 12) / 3
BATCHES = [_normal(10, 4, 5, 12), _normal(11, 2, 3, 12)]  # of different shapes


def twice(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"] + x @ p["v"]


def layers(p, x):
    h, inputs = x, []
    for w in p["s"]:
        inputs.append(h)
        h = jnp.tanh(h @ w)
    return h, inputs


def by_scan(p, x):
    return jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["s"])[0]


def recurrent(p, x):
    return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), x[:, 0], x.swapaxes(0, 1))[0]


def steps(p, x):
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]


def either(p, x):
    positive = lambda p, x: x @ p["w"]
    return jax.lax.cond(x[0, 0, 0] > 0, positive, lambda p, x: (x @ p["v"]) @ p["w"], p, x)


def experts(p, x):
    return jnp.einsum("bti,eio->bteo", x, p["s"]), jnp.einsum("ebti,eio->ebto", jnp.stack([x, 2 * x, -x * x]), p["s"])


def states(x):
    """What ``recurrent`` multiplies."""
    h, seen = x[:, 0], []
    for t in range(x.shape[1]):
        seen.append(h)
        h = jnp.tanh(h @ W + x[:, t])
    return seen


CASES = {
    "several uses": (
        twice,
        {"w": W, "v": W + 1},
        lambda x: {"w": gram(x, jnp.tanh(x @ W)), "v": gram(x)},
    ),
    "a list": (
        lambda p, x: layers(p, x)[0],
        {"s": list(S)},
        lambda x: {f"s.{i}": gram(seen) for i, seen in enumerate(layers({"s": S}, x)[1])},
    ),
    "a stack in a loop of Python's": (
        lambda p, x: layers(p, x)[0],
        {"s": S},
        lambda x: {"s": stack(*layers({"s": S}, x)[1])},
    ),
    "part of a stack by index": (
        lambda p, x: jnp.tanh(x @ p["s"][1]) @ p["s"][1:][1] + x @ p["s"][0],
        {"s": S},
        lambda x: {"s": stack(x, x, jnp.tanh(x @ S[1]))},
    ),
    "a scan with remat": (by_scan, {"s": S}, lambda x: {"s": stack(*layers({"s": S}, x)[1])}),
    "a scan of a part": (
        lambda p, x: by_scan({"s": p["s"][1:]}, x) @ p["s"][0],
        {"s": S},
        lambda x: {"s": stack(by_scan({"s": S[1:]}, x), *layers({"s": S[1:]}, x)[1])},
    ),
    "a recurrence": (recurrent, {"w": W}, lambda x: {"w": gram(*states(x))}),
    "a while loop": (steps, {"w": W}, lambda x: {"w": gram(x, jnp.tanh(x @ W))}),
    "experts, of one input and of their own": (
        experts,
        {"s": S},
        lambda x: {"s": stack((x, x), (x, 2 * x), (x, -x * x))},
    ),
    "several axes of inputs": (
        lambda p, x: jnp.einsum("btij,jio->bto", x.reshape(*x.shape[:2], 4, 3), p["w"]),
        {"w": _normal(3, 3, 4, 7)},
        lambda x: {"w": gram(x.reshape(*x.shape[:2], 4, 3).swapaxes(2, 3).reshape(*x.shape))},
    ),
    "mapped over examples": (
        lambda p, x: jax.vmap(lambda x: jax.vmap(lambda v: p["w"].T @ v)(x))(x),
        {"w": W},
        lambda x: {"w": gram(x)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hessians_are_sums_over_all_that_a_kernel_meets(name):
    apply, params, expected = CASES[name]
    found = fpq.collect_hessians(apply, params, iter(BATCHES), AS_THEY_ARE)
    wanted = [expected(x) for x in BATCHES]
    assert set(found) == set(wanted[0])
    for path, matrix in found.items():
        np.testing.assert_allclose(matrix, sum(w[path] for w in wanted), rtol=2e-5, atol=2e-4)


def test_a_branch_counts_where_it_is_taken():
    x = jnp.abs(BATCHES[0])
    found = fpq.collect_hessians(either, {"w": W, "v": W}, [x, -x], AS_THEY_ARE)
    np.testing.assert_allclose(found["v"], gram(x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["w"], gram(x, -x @ W), rtol=1e-5, atol=1e-4)


def test_kernels_of_one_input_share_a_hessian():
    def apply(p, x):
        cast = x.astype(jnp.bfloat16)  # and each layer casts for itself, as Flax's do
        return [cast.astype(jnp.float32) @ p[name] for name in "qkv"] + [x @ p["o"]]

    found = fpq.collect_hessians(apply, dict.fromkeys("qkvo", W), BATCHES, AS_THEY_ARE)
    assert list(found.stats.inputs) == [("k", "q", "v"), ("o",)]
    assert found["q"] is found["v"] and len(found) == 4


def test_inputs_are_quantized_as_inference_will_have_them():
    recipe = fpq.Recipe.load("w4a8-fp-m2")
    found = fpq.collect_hessians(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": W, "b": W}, BATCHES[:1], recipe)
    seen = fake_quantize_tokens(BATCHES[0], fpq.E4M3)
    np.testing.assert_allclose(found["a"], gram(seen), rtol=1e-5, atol=1e-4)
    behind = fake_quantize_tokens(jnp.tanh(seen @ W), fpq.E4M3)
    np.testing.assert_allclose(found["b"], gram(behind), rtol=1e-3, atol=1e-2)


def test_static_scales_are_of_the_inputs_as_they_are():
    recipe = fpq.Recipe.load("w8a8-fp").with_rule("a", activation_scale="static")
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + x @ p["a"]
    params = {"a": W, "b": W}
    found = fpq.collect_hessians(apply, params, iter(BATCHES), recipe)
    largest = max(float(jnp.abs(x).max()) for x in BATCHES)
    assert set(found.stats.static_scales) == {"a"}
    np.testing.assert_allclose(found.stats.static_scales["a"].scale, [largest / 448], rtol=1e-6)
    q = fpq.quantize_params(params, recipe, found)
    np.testing.assert_allclose(q["a"].input_scale, [largest / 448], rtol=1e-6)
    with pytest.raises(fpq.FpqError, match="s is a stack of kernels"):
        fpq.collect_hessians(by_scan, {"s": S}, BATCHES, fpq.Recipe.from_dict({"activation_scale": "static"}))


@pytest.mark.parametrize("flat", [False, True])
def test_masked_positions_do_not_count(flat):
    def apply(p, batch):
        x = batch["x"].reshape(-1, 12) if flat else batch["x"]
        return x @ p["w"]

    real = jnp.asarray(np.random.default_rng(0).random((4, 5)) < 0.5)
    x = jnp.where(real[..., None], BATCHES[0], jnp.nan)  # what stands there does not matter
    found = fpq.collect_hessians(
        apply, {"w": W}, [{"x": x, "real": real}], AS_THEY_ARE, mask=lambda batch: batch["real"]
    )
    np.testing.assert_allclose(found["w"], gram(BATCHES[0][real]), rtol=1e-5, atol=1e-4)
    with pytest.raises(fpq.FpqError, match=r"inputs of w are .* which a mask of 5x4 positions does not fit"):
        fpq.collect_hessians(lambda p, x: x @ p["w"], {"w": W}, [BATCHES[0]], AS_THEY_ARE, mask=lambda x: real.T)


def test_a_model_in_parts_each_behind_quantized_ones():
    recipe = fpq.Recipe.load("w4a8-fp-m2")
    apply, params = lambda p, x: layers(p, x)[0], {"s": list(S)}
    whole = fpq.collect_hessians(apply, params, BATCHES, recipe)
    part = fpq.collect_hessians(apply, params, BATCHES, recipe, only="s.0")
    assert list(part) == ["s.0"] and not part.complete
    params, report = fpq.quantize_params_with_report(params, recipe, part)
    assert isinstance(params["s"][0], fpq.QTensor) and report.left["s.1"].startswith("the Hessians are of another part")
    rest = fpq.collect_hessians(apply, params, BATCHES, recipe, only="s.[12]")
    inputs = [fake_quantize_tokens(jnp.tanh(fpq.linear(x, params["s"][0])), fpq.E4M3) for x in BATCHES]
    np.testing.assert_allclose(rest["s.1"], gram(*inputs), rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(rest["s.1"] - whole["s.1"]).max()) > 1e-2
    params = fpq.quantize_params(params, recipe, rest)
    assert all(isinstance(leaf, fpq.QTensor) for leaf in params["s"])


def test_what_cannot_be_calibrated_is_said():
    apply = lambda p, x: jax.nn.relu(x) @ p["w"]
    with pytest.raises(fpq.FpqError, match="There are no batches"):
        fpq.collect_hessians(apply, {"w": W}, [], AS_THEY_ARE)
    with pytest.raises(fpq.FpqError, match="w met only zeros during calibration"):
        fpq.collect_hessians(apply, {"w": W}, [-jnp.ones((3, 12))], AS_THEY_ARE)
    with pytest.raises(fpq.FpqError, match=r"s\[1\] met only zeros"):
        dispatch = lambda p, x: jnp.einsum("eti,eio->eto", x, p["s"])
        fpq.collect_hessians(dispatch, {"s": S}, [jnp.ones((3, 2, 12)).at[1].set(0)], AS_THEY_ARE)
    with pytest.raises(fpq.FpqError, match="w overflow or are not finite"):
        fpq.collect_hessians(apply, {"w": W}, [jnp.full((3, 12), jnp.inf)], AS_THEY_ARE)
    with pytest.raises(fpq.FpqError, match="only='v' fits no kernel"):
        fpq.collect_hessians(apply, {"w": W}, [jnp.ones((3, 12))], AS_THEY_ARE, only="v")
    with pytest.raises(fpq.FpqError, match="A batch holds arrays alone"):
        fpq.collect_hessians(lambda p, x, n: x @ p["w"], {"w": W}, [(jnp.ones((3, 12)), 3)], AS_THEY_ARE)
    with pytest.raises(fpq.FpqError, match="s is indexed by a number that is computed"):
        loop = lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h @ p["s"][i], x)
        fpq.collect_hessians(loop, {"s": S}, [jnp.ones((3, 12))], AS_THEY_ARE)
    # an input that is zero does not matter to what is rounded
    rounded = fpq.Recipe.from_dict({"method": "round"})
    assert float(fpq.collect_hessians(apply, {"w": W}, [-jnp.ones((3, 12))], rounded)["w"].max()) == 0

"""What a function does with its parameters, found without computing anything."""

import jax
import jax.numpy as jnp
import pytest

import fpq_jax as fpq


def apply(p, tokens, image):
    x = p["table"][tokens]
    x = x + p["positions"]
    x = jnp.einsum("btd,dnh->btnh", x, p["query"]) @ p["last"].T
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(p["layers"], 1, 0))
    x = jnp.einsum("btnf,bfo->btno", x, p["experts"]) + jnp.einsum("btnf,efo->btneo", x, p["experts"]).sum(3)
    x = x @ p["listed"][0] @ p["listed"][1]
    picture = jax.lax.conv(image, p["conv"], (1, 1), "SAME")
    apart = jnp.einsum("btnj,ijo->btnio", x[..., :4], p["apart"].reshape(2, 4, 5))
    vector = jnp.einsum("io,io->", p["vector"], jnp.ones((6, 2)))
    either = x[..., :4] @ p["either"] + x[..., :4] @ p["either"].T
    return x @ p["tied"], p["tied"][0], picture, apart, vector, either


SHAPES = {
    "table": (50, 6),
    "positions": (3, 6),
    "query": (6, 4, 8),
    "last": (8, 8),
    "layers": (8, 5, 8),
    "experts": (2, 8, 8),
    "listed": (2, 8, 8),
    "conv": (7, 3, 2, 2),
    "apart": (8, 5),
    "vector": (6, 2),
    "tied": (8, 9),
    "either": (4, 4),
    "unused": (3, 3),
    "bias": (8,),
}


def test_axes_and_reasons():
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    params["ints"] = jax.ShapeDtypeStruct((3, 3), jnp.int32)
    shapes = (jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32))
    uses = fpq.find_kernels(apply, params, *shapes)
    kinds = {name: use.axes.kinds for name, use in uses.items() if use.axes is not None}
    assert kinds == {
        "query": ("in", "out", "out"),
        "last": ("out", "in"),
        "layers": ("in", "stack", "out"),
        "experts": ("stack", "in", "out"),
        "listed": ("stack", "in", "out"),
        "tied": ("in", "out"),
    }
    why = {name: use.reason for name, use in uses.items() if use.reason}
    assert why.keys() == uses.keys() - kinds.keys() | {"tied"}
    assert why["table"] == "it is used by gather, not in a product"
    assert why["conv"] == "it is used by conv_general_dilated, not in a product"
    assert why["tied"].startswith("it is also used by")
    assert why["unused"] == "it is not used in a product"
    assert why["apart"] == "a product takes one of its axes apart"
    assert why["vector"] == "its products leave it no outputs"
    assert why["either"] == "its products are over different axes of it"
    assert "bias" not in uses and "ints" not in uses


@pytest.mark.parametrize("length", [1, 3])
def test_a_stack_of_one_is_a_stack(length):
    params = {"w": jax.ShapeDtypeStruct((length, 8, 8), jnp.bfloat16)}
    scan = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    (use,) = fpq.find_kernels(scan, params, jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)).values()
    assert use.axes.kinds == ("stack", "in", "out") and use.axes.dtype == "bfloat16"

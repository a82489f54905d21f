"""A function over a dict: experts whose weights are stacked, each with a Hessian of its own, and padded batches."""

import jax
import jax.numpy as jnp

import fpq_jax as fpq


def apply(params, tokens):
    """Token ids [B, T] to logits."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["mix"]) @ layer["out"].T
        gates = jax.nn.softmax(x @ layer["router"])
        hidden = jax.nn.relu(jnp.einsum("btd,edf->ebtf", x, layer["up"]))
        x = x + jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", hidden, layer["down"]), gates)
    return x @ params["embedding"].T


def model():
    """(apply, params, batches): yours."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / shape[-2] ** 0.5
    layer = lambda i: {
        "mix": draw(i, 64, 96),
        "out": draw(i + 1, 64, 96),
        "router": draw(i + 2, 64, 4),
        "up": draw(i + 3, 4, 64, 32),
        "down": draw(i + 4, 4, 32, 64),
    }
    params = {"embedding": draw(0, 256, 64), "layers": [layer(10), layer(20)]}
    return apply, params, list(jax.random.randint(jax.random.key(1), (4, 8, 32), 0, 256))


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    for path, use in fpq.find_kernels(apply, params, batches[0]).items():
        print(path, use.reason or use.axes.kinds)
    recipe = fpq.Recipe.load("w4a8-fp-m1").with_rule("*router", quantize=False).with_group_size(32)
    hessians = fpq.collect_hessians(apply, params, batches, recipe, mask=lambda tokens: tokens != 0)
    small = fpq.quantize_params(params, recipe, hessians)
    logits = jax.jit(fpq.quantized(apply))(small, batches[0])
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

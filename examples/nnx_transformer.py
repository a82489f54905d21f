"""An NNX transformer: its parameters are an nnx.State, and its forward pass a function of that."""

import jax
import jax.numpy as jnp
from flax import nnx

import fpq_jax as fpq


class Block(nnx.Module):
    """Attention and an MLP."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(size, rngs=rngs), nnx.RMSNorm(size, rngs=rngs)
        self.qkv = nnx.Einsum("btd,dcnh->cbtnh", (size, 3, 4, size // 4), rngs=rngs)
        self.out = nnx.LinearGeneral((4, size // 4), size, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(size, 2 * size, rngs=rngs), nnx.Linear(2 * size, size, rngs=rngs)

    def __call__(self, x):
        q, k, v = self.qkv(self.norm1(x))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Token ids [B, T] to logits, with the embedding for a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 64, rngs=rngs)
        self.blocks = nnx.List([Block(64, rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


def model():
    """(apply, params, batches): yours."""
    graph, params = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)
    batches = list(jax.random.randint(jax.random.key(0), (4, 8, 32), 0, 256))
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params, batches


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2-lorc")
    hessians = fpq.collect_hessians(apply, params, batches, recipe)
    small, report = fpq.quantize_params_with_report(params, recipe, hessians)
    logits = jax.jit(fpq.quantized(apply))(small, batches[0])
    print("left as they are:", report.left)  # the embedding: it is looked up as well
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

"""An Equinox transformer: weights are [out, in], and a model of one sequence is mapped over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp

import fpq_jax as fpq


class Block(eqx.Module):
    """Attention and an MLP."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, size: int, key):
        self.norm = eqx.nn.LayerNorm(size)
        self.attention = eqx.nn.MultiheadAttention(4, size, key=key)
        self.mlp = eqx.nn.MLP(size, size, 2 * size, depth=1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(x)


class Transformer(eqx.Module):
    """Token ids [T] to logits."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(256, 64, key=key)
        self.blocks = [Block(64, key) for key in jax.random.split(key)]
        self.head = eqx.nn.Linear(64, 256, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def model():
    """(apply, params, batches): yours."""
    batches = list(jax.random.randint(jax.random.key(0), (4, 8, 32), 0, 256))
    return lambda model, tokens: jax.vmap(model)(tokens), Transformer(jax.random.key(1)), batches


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2").with_rule("head.*", quantize=False)
    small = fpq.quantize_params(params, recipe, fpq.collect_hessians(apply, params, batches, recipe))
    logits = eqx.filter_jit(fpq.quantized(apply))(small, batches[0])  # activations are leaves, which jit refuses
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

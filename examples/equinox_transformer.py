"""An Equinox transformer: weights are [out, in], and a model of one sequence is mapped over the batch."""

import equinox as eqx
import jax

import fpq_jax as fpq


class Block(eqx.Module):
    """Attention and an MLP."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(64)
        self.attention = eqx.nn.MultiheadAttention(4, 64, key=key)
        self.mlp = eqx.nn.MLP(64, 64, 128, depth=1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=jax.numpy.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(x)


class Transformer(eqx.Module):
    """Token ids [T] to logits."""

    embed: eqx.nn.Embedding
    blocks: list[Block]

    def __init__(self, key):
        self.embed, self.blocks = eqx.nn.Embedding(256, 64, key=key), [Block(key) for key in jax.random.split(key)]

    def __call__(self, tokens):
        x = self.embed.weight[tokens]
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T


def model():
    """(apply, params, batches): yours."""
    apply = lambda model, tokens: jax.vmap(model)(tokens)
    return apply, Transformer(jax.random.key(1)), list(jax.random.randint(jax.random.key(0), (4, 8, 32), 0, 256))


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2")
    small = fpq.quantize_params(params, recipe, fpq.collect_hessians(apply, params, batches, recipe))
    logits = eqx.filter_jit(fpq.quantized(apply))(small, batches[0])
    print("largest difference of a logit:", abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

"""A Linen transformer: layers scanned over and rematerialized, attention of DenseGenerals."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import fpq_jax as fpq


class Block(nn.Module):
    """Attention and a gated MLP."""

    @nn.compact
    def __call__(self, x, mask):
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h, mask=mask)
        h = nn.RMSNorm()(x)
        h = nn.silu(nn.Dense(128, name="gate")(h)) * nn.Dense(128, name="up")(h)
        return x + nn.Dense(64, name="down")(h), None


class Transformer(nn.Module):
    """Token ids [B, T] to logits."""

    vocabulary: int = 256
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, 64)(tokens)
        over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        scanned = nn.scan(nn.remat(Block), length=self.layers, **over)
        x, _ = scanned(name="blocks")(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.vocabulary, name="head")(nn.RMSNorm()(x))


def model():
    """(apply, params, batches): yours."""
    batches = list(jax.random.randint(jax.random.key(0), (4, 8, 32), 0, 256))
    params = Transformer().init(jax.random.key(1), batches[0])
    return Transformer().apply, params, batches


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2").with_rule("*.head.*", quantize=False)
    hessians = fpq.collect_hessians(apply, params, batches, recipe)
    small, report = fpq.quantize_params_with_report(params, recipe, hessians)
    logits = jax.jit(fpq.quantized(apply))(small, batches[0])
    for result in report.results:
        print(f"{result.name:60} {result.rounding_error:.4f} -> {result.error:.4f}")
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

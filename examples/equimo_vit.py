"""A model that others wrote: equimo's vision transformer, whose patches go through a convolution."""

import equinox as eqx
import jax
import jax.numpy as jnp
from equimo.models import VisionTransformer

import fpq_jax as fpq


def model():
    """(apply, params, batches): theirs."""
    vit = VisionTransformer(
        img_size=32,
        in_channels=3,
        dim=64,
        patch_size=8,
        num_heads=4,
        depths=[2],
        num_classes=10,
        key=jax.random.key(0),
    )
    params, rest = eqx.partition(eqx.nn.inference_mode(vit), eqx.is_inexact_array)

    def apply(params, images):
        classify = eqx.combine(params, rest)
        return jax.vmap(lambda image: classify(image, key=jax.random.key(0)))(images)

    return apply, params, list(jax.random.normal(jax.random.key(1), (4, 8, 3, 32, 32)))


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2").with_rule("head.*", quantize=False)
    hessians = fpq.collect_hessians(apply, params, batches, recipe)
    small, report = fpq.quantize_params_with_report(params, recipe, hessians)
    logits = jax.jit(fpq.quantized(apply))(small, batches[0])
    for path, why in report.left.items():
        print(f"{path} is left: {why}")
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

"""A model that others wrote: penzai's LLaMA, whose weights are arrays with named axes in an order of their own."""

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.variants import llamalike_common

import fpq_jax as fpq


def model():
    """(apply, params, batches): theirs."""
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=64,
        projection_dim=16,
        mlp_hidden_dim=128,
        num_decoder_blocks=2,
        vocab_size=256,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    llama = llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    layers, params = pz.unbind_variables(llama, freeze=True)

    def apply(params, tokens):
        logits = pz.bind_variables(layers, params)(pz.nx.wrap(tokens, "batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return apply, params, list(jax.random.randint(jax.random.key(1), (4, 8, 32), 0, 256))


def main():
    """Quantize it, and run it."""
    apply, params, batches = model()
    recipe = fpq.Recipe.load("w4a8-fp-m2-lorc")
    hessians = fpq.collect_hessians(apply, params, batches, recipe)
    small, report = fpq.quantize_params_with_report(params, recipe, hessians)
    logits = jax.jit(fpq.quantized(apply))(small, batches[0])
    for result in report.results:
        print(f"{result.name:80} {result.rounding_error:.4f} -> {result.error:.4f}")
    print("largest difference of a logit:", jnp.abs(logits - apply(params, batches[0])).max())


if __name__ == "__main__":
    main()

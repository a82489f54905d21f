"""Win back some of what quantization lost: train LoRC's factors alone to match the original's logits."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fpq_jax as fpq

LENGTH, STEPS, BATCH = 256, 60, 4


def model():
    """(apply, params) of the demo LLaMA; any other model would do."""
    graph, params = nnx.split(fpq.load("demo-llama", dtype=jnp.float32))
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params


def fine_tune(apply, params, small, windows):
    """The quantized parameters with LoRC factors that bring their logits nearer to the original's."""
    student = fpq.quantized(apply)
    trained, rest = fpq.partition(small)  # the factors; codes and scales stay
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    def loss(trained, tokens):
        teacher = jax.nn.log_softmax(apply(params, tokens))
        log_probs = jax.nn.log_softmax(student(fpq.combine(trained, rest), tokens))
        return optax.losses.kl_divergence_with_log_targets(log_probs, teacher).mean()

    @jax.jit
    def step(trained, state, tokens):
        value, gradient = jax.value_and_grad(loss)(trained, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    state = optimizer.init(trained)
    for i in range(STEPS):
        trained, state, value = step(trained, state, windows[i * BATCH :][:BATCH])
        print(f"step {i}: {value:.4f} nats from the original") if i % 20 == 0 else None
    return fpq.combine(trained, rest)


def main():
    """(original, quantized, fine-tuned) perplexity on text that none of this saw."""
    apply, params = model()
    calibration = fpq.text_windows("demo", "demo-llama", LENGTH, num_samples=STEPS * BATCH)
    recipe = fpq.Recipe.load("w4a8-fp-m2-lorc")
    hessians = fpq.collect_hessians(apply, params, calibration.reshape(-1, 8, LENGTH), recipe)
    small = fpq.quantize_params(params, recipe, hessians)
    tuned = fine_tune(apply, params, small, calibration)
    unseen = fpq.text_windows("demo", "demo-llama", LENGTH)[:64]
    runs = (("original", apply, params), ("W4A8", fpq.quantized(apply), small), ("tuned", fpq.quantized(apply), tuned))
    found = {name: fpq.perplexity(function, tree, unseen).value for name, function, tree in runs}
    print("perplexity:", found)
    return found


if __name__ == "__main__":
    main()

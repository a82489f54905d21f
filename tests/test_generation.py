import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import FpqError, load
from fpq_jax._generation import _sample, generate

PROMPT = [256, 5, 9, 77]


def test_greedy_equals_the_whole_forward_at_every_step(tiny_llama):
    model = load(tiny_llama)
    heard = []
    result = generate(model, PROMPT, max_new_tokens=12, on_token=heard.append)
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(jnp.argmax(model(jnp.asarray([tokens]))[0, -1])))
    assert result.tokens == heard == tokens[len(PROMPT) :]
    assert result.decode_steps == 11 and result.decode_seconds > 0


def test_it_ends_at_stop_tokens_and_at_the_last_position(tiny_llama):
    model = load(tiny_llama)
    free = generate(model, PROMPT, max_new_tokens=10).tokens
    stop = free[4]
    assert generate(model, PROMPT, max_new_tokens=10, stop={stop}).tokens == free[: free.index(stop)]
    assert len(generate(model, PROMPT, max_new_tokens=1000).tokens) == 64 - len(PROMPT) + 1
    assert len(generate(model, PROMPT, max_new_tokens=1).tokens) == 1


def test_sampling_follows_its_seed_and_temperature(tiny_llama):
    model = load(tiny_llama)
    draw = lambda seed, t: generate(model, PROMPT, max_new_tokens=20, temperature=t, seed=seed).tokens
    assert draw(1, 5.0) == draw(1, 5.0) != draw(2, 5.0)
    assert draw(1, 1e-4) == generate(model, PROMPT, max_new_tokens=20).tokens


def test_top_p_keeps_the_likeliest_tokens_of_that_mass():
    probabilities = np.array([0.05, 0.5, 0.15, 0.3])
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    draws = lambda p: np.asarray(
        jax.vmap(lambda k: _sample(logits, k, temperature=1.0, top_p=p))(jax.random.split(jax.random.key(0), 4000))
    )
    assert set(draws(0.45).tolist()) == {1}
    assert set(draws(0.75).tolist()) == {1, 3}
    counts = np.bincount(draws(1.0), minlength=4) / 4000
    np.testing.assert_allclose(counts, probabilities, atol=0.03)


def test_prompts_that_cannot_be_continued_are_refused(tiny_llama):
    model = load(tiny_llama)
    with pytest.raises(FpqError, match="no tokens"):
        generate(model, [], max_new_tokens=3)
    with pytest.raises(FpqError, match="64 tokens; the model takes at most 63"):
        generate(model, [5] * 64, max_new_tokens=3)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPT_CONFIG, TINY_CONFIG, mostly_full, random_tensors, write_checkpoint

from fpq_jax import FpqError, Generator, QuantSpec, Sampling, load, lorc, prepare, quantize_array
from fpq_jax._generation.generator import sample
from fpq_jax._generation.row_sharding import row_keys
from fpq_jax.models.parameters import params_of, with_params

_quantize = jax.jit(quantize_array, static_argnums=1)
PROMPT = [256, 5, 9, 77]
PROMPTS = [PROMPT, [256, 8], [256, *range(40)], [256, 1, 2, 3, 4, 5, 6]]


def generate(model, prompt, **options):
    return Generator(model)([prompt], **options).tokens[0]


def quantized(model, **changes):
    spec = QuantSpec(**({"group_size": 32, "constraint": "m2"} | changes))
    small = lambda w: lorc(w, _quantize(w, spec), rank=2)
    params = params_of(model).items()
    return with_params(
        model, {p: small(v) if p.startswith("layers.") and p.endswith("kernel") else v for p, v in params}
    )


@pytest.mark.parametrize(
    ("weights", "folder"),
    mostly_full([(weights, f"tiny_{name}") for weights in ("fp8", "packed", None) for name in ("llama", "opt")], 1),
)
def test_greedy_rows_of_a_batch_equal_whole_forwards_one_by_one(request, folder, weights):
    model = load(request.getfixturevalue(folder))
    if weights is not None:
        model = prepare(quantized(model), weights)
    heard = {row: [] for row in range(len(PROMPTS))}
    generator = Generator(model)
    result = generator(PROMPTS, max_new_tokens=8, on_token=lambda row, token: heard[row].append(token))
    assert list(heard.values()) == result.tokens
    whole = jax.jit(lambda t: model(t))
    for prompt, new in zip(PROMPTS, result.tokens, strict=True):
        tokens = list(prompt)
        for token in new:
            logits = whole(jnp.asarray([tokens + [0] * (64 - len(tokens))]))[0, len(tokens) - 1]
            assert token == int(jnp.argmax(logits))
            tokens.append(token)
    assert generator([PROMPTS[2]], max_new_tokens=8).tokens[0] == result.tokens[2]
    assert result.decode_steps == 7 and result.decode_seconds > 0
    assert result.cache_bytes == 2 * 2 * 4 * 64 * {"tiny_llama": 2, "tiny_opt": 4}[folder] * 12 * 4


def test_programs_are_compiled_once_for_shapes(tiny_llama):
    generator = Generator(load(tiny_llama))
    for prompts in ([PROMPT], [PROMPT[:2]], [PROMPT * 5]):
        generator(prompts, max_new_tokens=9)
    assert len(generator._programs) == 2
    generator([PROMPT, PROMPT], max_new_tokens=9)
    assert len(generator._programs) == 4


def test_programs_take_the_weights_as_arguments_and_write_the_cache_in_place(tiny_llama):
    """That none copies a weight on the way is seen where temporaries are smaller than one, in test_hopper."""
    model = prepare(quantized(load(tiny_llama)), "fp8")
    generator = Generator(model)
    generator([PROMPT], max_new_tokens=3)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params_of(model)))
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(1, 64, jnp.float32)))
    for program in generator._programs.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == cache
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024
        assert memory.argument_size_in_bytes > weights


def test_rows_end_at_stop_tokens_and_at_the_last_position(tiny_llama):
    model = load(tiny_llama)
    free = generate(model, PROMPT, max_new_tokens=10)
    stop = free[4]
    assert generate(model, PROMPT, max_new_tokens=10, stop={stop}) == free[: free.index(stop)]
    rows = Generator(model)([PROMPT, [256, 8]], max_new_tokens=1000).tokens
    assert [len(row) for row in rows] == [64 - 4 + 1, 64 - 2 + 1]
    assert len(generate(model, PROMPT, max_new_tokens=1)) == 1
    rows = Generator(model)([PROMPT, [256, 8]], max_new_tokens=10, stop={stop}).tokens
    assert rows[0] == free[: free.index(stop)] and len(rows[1]) == 10


@pytest.mark.parametrize("strange", [300, -1, 2**31 - 1])
def test_a_token_that_the_model_has_not_is_said(tiny_llama, strange):
    with pytest.raises(FpqError, match=f"A prompt has token {strange}, but the model's last is 299"):
        generate(load(tiny_llama), [256, 5, strange], max_new_tokens=2)


@pytest.mark.full
def test_an_fp8_cache_is_half_of_bfloat16s_and_hardly_changes_the_logits(tiny_llama):
    model = load(tiny_llama, dtype="bfloat16")
    plain, small = Generator(model), Generator(model, kv_cache="float8")
    bytes_ = [g([PROMPT], max_new_tokens=4).cache_bytes for g in (plain, small)]
    assert bytes_[1] == bytes_[0] * (12 + 4) // (2 * 12)  # a head of 12 has a byte each, and a float32
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 30)))
    model = load(tiny_llama)
    whole = model(tokens)
    logits, _ = model(tokens, model.init_cache(2, 30, jnp.float8_e4m3fn))
    error = float(jnp.linalg.norm(logits - whole) / jnp.linalg.norm(whole))
    assert 1e-4 < error < 0.05


def test_several_rows_in_bfloat16(tiny_llama):
    """Products of which XLA has no batched form on the CPU."""
    generator = Generator(load(tiny_llama, dtype="bfloat16"))
    assert [len(row) for row in generator(PROMPTS, max_new_tokens=4).tokens] == [4] * 4


def test_sampling_follows_its_seed_and_temperature(tiny_llama):
    model = load(tiny_llama)
    draw = lambda seed, t: generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(temperature=t), seed=seed)
    assert draw(1, 5.0) == draw(1, 5.0) != draw(2, 5.0)
    assert draw(1, 1e-4) == generate(model, PROMPT, max_new_tokens=20)
    first, second = Generator(model)([PROMPT, PROMPT], max_new_tokens=20, sampling=Sampling(temperature=5.0)).tokens
    assert first != second


def test_top_p_keeps_the_likeliest_tokens_of_that_mass():
    probabilities = np.array([0.05, 0.5, 0.15, 0.3])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (4000, 4))
    draws = lambda p: np.asarray(
        sample(logits, Sampling(temperature=1.0, top_p=p), row_keys(0, 4000), jnp.arange(4000))
    )
    assert set(draws(0.45).tolist()) == {1}
    assert set(draws(0.75).tolist()) == {1, 3}
    counts = np.bincount(draws(1.0), minlength=4) / 4000
    np.testing.assert_allclose(counts, probabilities, atol=0.03)


def test_prompts_that_cannot_be_continued_are_refused(tiny_llama):
    generator = Generator(load(tiny_llama))
    for prompts in ([], [[]], [PROMPT, []]):
        with pytest.raises(FpqError, match="no tokens"):
            generator(prompts, max_new_tokens=3)
    with pytest.raises(FpqError, match="64 tokens; the model takes at most 63"):
        generator([PROMPT, [5] * 64], max_new_tokens=3)
    with pytest.raises(FpqError, match="max_new_tokens is 0; it must be at least 1"):
        generator([PROMPT], max_new_tokens=0)
    for nonsense, said in (
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ):
        with pytest.raises(FpqError, match=said):
            Sampling(**nonsense)


@pytest.mark.full
def test_decoding_equals_the_whole_forward_where_no_code_can_turn(tiny_llama):
    """Weights quantized and activations not: token for token over many tokens, and in the logits.

    FP8 activations turn a code where float32's noise meets a tie, in a decode step as in a forward pass of other shape.
    """
    model = prepare(quantized(load(tiny_llama), activation=None))
    prompts = [[256, *range(row, row + 2 + row)] for row in range(4)]
    rows = Generator(model)(prompts, max_new_tokens=40).tokens
    forward = jax.jit(lambda t: model(t))
    step = jax.jit(lambda t, cache, start: model(t, cache, start))
    for prompt, new in zip(prompts, rows, strict=True):
        whole = forward(jnp.asarray([prompt + new]))[0]
        assert new == np.argmax(whole[len(prompt) - 1 : -1], axis=-1).tolist()
        cache = model.init_cache(1, 64, jnp.float32)
        for i, token in enumerate(prompt + new):
            logits, cache = step(jnp.asarray([[token]]), cache, jnp.asarray([i]))
            np.testing.assert_allclose(logits[0, 0], whole[i], atol=2e-5 * float(jnp.abs(whole).max()))


@pytest.mark.full
@pytest.mark.parametrize("config", [TINY_CONFIG, OPT_CONFIG], ids=["llama", "opt"])
def test_a_longest_position_that_is_no_round_number(tmp_path, config):
    """OPT has no embedding of what is behind its last position."""
    config = config | {"max_position_embeddings": 100}
    model = load(write_checkpoint(tmp_path / "m", config, random_tensors(config)))
    prompts = [list(range(1, 71)), list(range(3, 93)), [5, 6]]
    rows = Generator(model)(prompts, max_new_tokens=20).tokens
    assert [len(row) for row in rows] == [20, 11, 20]
    for prompt, new in zip(prompts, rows, strict=True):
        logits = np.asarray(model(jnp.asarray([prompt + new[:-1]])))[0, len(prompt) - 1 :]
        assert new == np.argmax(logits, axis=-1).tolist()


def test_an_unknown_cache_is_said(tiny_llama):
    with pytest.raises(FpqError, match="kv_cache is 'fp8'; it must be model or float8"):
        Generator(load(tiny_llama), kv_cache="fp8")

import math

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward
from flax import nnx

from fpq_jax import FpqError
from fpq_jax._pipeline.batches import Batches, batch_size
from fpq_jax._pipeline.perplexity import perplexity
from fpq_jax._support.mesh import make_mesh


class Bigram(nnx.Module):
    """Logits that depend on the last token only."""

    def __init__(self, table):
        self.table = nnx.Param(table)

    def __call__(self, tokens):
        return self.table.get_value()[tokens]


def test_every_token_of_a_window_but_its_first_is_predicted():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 50)).astype(np.float32)
    windows = rng.integers(0, 50, (37, 600)).astype(np.int32)
    log_probs = table - np.log(np.exp(table.astype(np.float64)).sum(axis=1, keepdims=True))
    losses = -log_probs[windows[:, :-1], windows[:, 1:]]
    done = []
    value, tokens = perplexity(forward, Bigram(jnp.asarray(table)), windows, advance=done.append)
    assert tokens == 37 * 599 == losses.size
    assert value == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert sum(done) == 37 and len(done) > 1


def test_logits_in_16_bits_are_summed_in_more():
    windows = np.zeros((64, 128), np.int32)
    value, _ = perplexity(forward, Bigram(jnp.zeros((7, 7), jnp.bfloat16)), windows)
    assert value == pytest.approx(7, rel=1e-6)


def test_a_model_that_overflows_is_said():
    with pytest.raises(FpqError, match="not a finite number"):
        perplexity(forward, Bigram(jnp.full((3, 3), jnp.nan)), np.zeros((1, 4), np.int32))


def test_batches_are_equal_and_the_filling_is_counted():
    windows = np.arange(30).reshape(15, 2)
    cut = Batches.of(windows, make_mesh(), 2)
    assert [real.sum() for real in cut.real] == [2] * 7 + [1] and {b.shape for b in cut.tokens} == {(2, 2)}
    np.testing.assert_array_equal(
        np.concatenate([b[real] for b, real in zip(cut.tokens, cut.real, strict=True)]), windows
    )
    sizes = [batch_size(count, length, make_mesh()) for count, length in ((3, 100_000), (3, 10), (1000, 512))]
    assert sizes == [1, 1, 16]

"""What is refused before it starts, and what would fit; that the numbers are right is measured in test_memory."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from fpq_jax import FpqError, Recipe, make_mesh
from fpq_jax._algorithms.recipe import Rule
from fpq_jax._checkpoints.huggingface import HfCheckpoint
from fpq_jax._pipeline.estimate import Estimate, estimate
from fpq_jax._pipeline.quantize_layers import linears
from fpq_jax.models.spec import ModelSpec

GIB = 2**30
FITS = Estimate(host=3 * GIB, resident=GIB, per_window=GIB // 64, device=GIB, disk=GIB, windows=64, streams=1,
                evaluated=30, free_host=8 * GIB, free_device=8 * GIB, free_disk=8 * GIB)  # fmt: skip


def check(found: Estimate, smallest: Estimate = FITS) -> None:
    found.check(Path("out"), lambda: smallest, 64)


def test_what_fits_is_told_and_not_refused():
    check(FITS)
    assert str(FITS) == "Needs about 3.00 GiB of 9.00 GiB of memory, 1.00 GiB of 8.00 GiB on each device, " \
        "1.00 GiB of 8.00 GiB of disk."  # fmt: skip
    unknown = replace(FITS, free_host=None, free_device=None)
    check(unknown)
    assert str(unknown) == "Needs about 3.00 GiB of memory, 1.00 GiB of 8.00 GiB of disk."


@pytest.mark.parametrize(
    ("changes", "smallest", "said"),
    [
        ({"free_host": GIB + GIB // 2}, {}, "--num-samples 23 --max-windows 23 would fit"),
        (
            {"free_host": GIB + GIB // 2, "streams": 2, "host": 4 * GIB},
            {},
            "free; --num-samples 11 --max-windows 23 would fit",
        ),
        ({"free_host": GIB // 2}, {}, "--batch-tokens 64 would fit"),
        ({"free_host": GIB // 2}, {"free_host": GIB // 2}, "use a shorter --seq-len, or more memory"),
        ({"free_device": GIB}, {}, "1.00 GiB of a device's memory and 1.00 GiB are free; --batch-tokens 64 would fit"),
        ({"free_device": GIB}, {"free_device": GIB}, "needs a device with more memory"),
        ({"free_disk": GIB}, {}, "The result takes about 1.00 GiB and out has 1.00 GiB left"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(changes, smallest, said):
    with pytest.raises(FpqError) as error:
        check(replace(FITS, **changes), replace(FITS, **smallest))
    assert said in str(error.value)
    if said.startswith("--num-samples"):  # so many do fit
        samples = int(said.split()[1])
        less = {"host": FITS.host - (64 - samples) * FITS.per_window, "windows": samples, "evaluated": samples}
        check(replace(FITS, **changes, **less))


@pytest.mark.full
def test_fewer_tokens_a_batch_fewer_windows_and_what_is_written_take_less(tiny_llama):
    checkpoint = HfCheckpoint(tiny_llama)
    model_spec = ModelSpec(checkpoint.model_class, checkpoint.model_config, jnp.dtype("float32"))
    recipe = Recipe.load("w4a8-fp-m2-lorc").with_lorc_rank(4)
    names = linears(checkpoint)

    def of(windows, recipe=recipe, **more):
        return estimate(model_spec, recipe, names, (windows, 64), 64, make_mesh(), tiny_llama, **more)

    large, small = of(256), of(256, batch_tokens=64)
    assert small.device < large.device and small.disk == large.disk and small.per_window == 64 * 48 * 4
    more = of(756, batch_tokens=64)
    assert (more.host - more.resident) - (small.host - small.resident) == 500 * small.per_window
    linear = replace(recipe.default, lorc=None, error_propagation=0.5)
    behind = replace(recipe, default=linear, sequential=True)
    beside, thrice = (of(windows, behind, batch_tokens=64) for windows in (256, 756))
    assert (thrice.host - thrice.resident) - (beside.host - beside.resident) == 2 * 500 * small.per_window
    assert of(256, written=1000).disk == large.disk - 1000
    assert of(256, states=10).disk == large.disk + 10 * small.per_window
    # what is in FP8 takes a byte, and four for each token's scale
    assert large.disk - of(256, replace(recipe, embedding="e4m3")).disk == 300 * (48 * 3 - 4)
    # gradients: what the layers are given, and the Fisher information, are on the disk until the result is there
    plain = replace(recipe, default=replace(recipe.default, lorc=None))
    with_fisher = replace(plain, default=replace(plain.default, fisher=0.2))
    assert of(256, with_fisher).disk - of(256, plain).disk == (2 + 2) * 64 * (64 * 48 * 4) + 2 * 4 * (6 * 48**2 + 80**2)
    # bits decide what the layers take
    more, fewer = (of(256, plain.with_bits(bits)).disk for bits in (8, 6))
    assert more - fewer == 2 * sum(2 * size // 8 for size in [48 * 48] * 2 + [48 * 24] * 2 + [48 * 80] * 3)
    # every Linear but one left as it is: hardly anything is captured or solved
    rules = (Rule(match="*", change=None), Rule(match="*.0.*.q_proj", change=recipe.default))
    assert of(256, replace(recipe, rules=rules)).disk > large.disk

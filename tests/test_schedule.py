"""The kernel's units: each is somebody's, once."""

from collections import defaultdict

import pytest

from fpq_jax._matmul.fp4_kernel.schedule import H100_PROCESSORS, Schedule, schedule_for

# hidden and feed-forward sizes of LLaMA-7B to 65B and OPT-6.7B to 66B
WIDTHS = [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (4096, 16384), (7168, 28672), (9216, 36864)]


def runs_of(s):
    """Tile -> the runs that have a step of it, counted one unit after the other."""
    found = defaultdict(list)
    for unit in range(s.units):
        tile, run = unit // s.steps, unit // s.run
        if run not in found[tile]:
            found[tile].append(run)
    return found


@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("processors", [1, 3, 132])
@pytest.mark.parametrize(("k", "n"), [(256, 64), (4096, 4096), (1000, 1000)])
def test_every_unit_is_in_one_run(m, processors, k, n):
    s = Schedule(m, k, n, 256, 16, 2, 4, processors)
    runs = runs_of(s)
    assert s.blocks <= processors and (s.blocks - 1) * s.run < s.units <= s.blocks * s.run
    assert len(runs) == s.token_tiles * s.output_tiles
    for tile, own in runs.items():
        assert own == list(range(s.first_run(tile), s.last_run(tile) + 1))
    assert s.slots == max(map(len, runs.values()))


@pytest.mark.parametrize(("hidden", "ffn"), WIDTHS)
@pytest.mark.parametrize("m", [1, 16, 128])
def test_the_papers_shapes_are_dealt_out_evenly(hidden, ffn, m):
    for k, n in ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)):
        s = schedule_for(m, k, n, 256)
        assert s.processors == H100_PROCESSORS and s.tokens >= m
        assert s.units / (s.run * H100_PROCESSORS) > 0.85  # of all processors' time
        assert m > 16 or s.slots * s.rows * 4 <= 0.125 * k / 2  # bytes of an output's partial sums and codes
        shared = s.stages * (s.warpgroups * 64 * 256 // 2 + s.tokens * 256 + s.outputs * 4)
        assert shared < 220 * 1024 < 227 * 1024


def test_tiles_of_tokens():
    assert [schedule_for(m, 512, 512, None).tokens for m in (1, 8, 9, 17, 33, 65, 128, 500)] == [
        8, 8, 16, 32, 64, 128, 128, 128,
    ]  # fmt: skip
    assert schedule_for(500, 512, 512, None).token_tiles == 4 and schedule_for(500, 512, 512, None).rows == 512
    assert [schedule_for(5, 512, 512, group).part for group in (None, 512, 256, 64)] == [256, 256, 256, 64]

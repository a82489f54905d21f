"""Who multiplies what: the product's units, dealt out evenly over the processors.

A unit is one tile of outputs, all tokens of a tile and one step along the inputs. Units are numbered with the steps
fastest and dealt out in runs of equal length, one run to a processor, so that all finish together whatever the shape
("stream-K", Osama et al., arXiv 2301.03598). A tile whose steps are in several runs has a partial sum of each, in slots
that are added up afterwards, always in the same order.
"""

from dataclasses import dataclass
from typing import Any

import jax

STEP = 256  # inputs of a unit
MOST_TOKENS = 128  # for more of them ``linear`` expands the weight instead; not measured either
H100_PROCESSORS = 132
# tokens of a tile -> (warpgroups that multiply, steps in flight). Chosen by arithmetic (bytes in flight, registers,
# shared memory), not measured: no GPU has run the kernel yet.
_TILES = {8: (2, 8), 16: (2, 8), 32: (2, 7), 64: (2, 6), 128: (2, 4)}


@dataclass(frozen=True)
class Schedule:
    """Of a product of [m, k] and [k, n], whose weight has a scale for each ``group`` inputs (None: none)."""

    m: int
    k: int
    n: int
    group: int | None
    tokens: int
    warpgroups: int
    stages: int
    processors: int

    @property
    def outputs(self) -> int:
        """Of a tile: 64 for each warpgroup."""
        return 64 * self.warpgroups

    @property
    def output_tiles(self) -> int:
        return -(-self.n // self.outputs)

    @property
    def token_tiles(self) -> int:
        return -(-self.m // self.tokens)

    @property
    def rows(self) -> int:
        """Tokens of the partial sums."""
        return self.m if self.token_tiles == 1 else self.token_tiles * self.tokens

    @property
    def steps(self) -> int:
        """Of a tile, along the inputs."""
        return -(-self.k // STEP)

    @property
    def units(self) -> int:
        return self.token_tiles * self.output_tiles * self.steps

    @property
    def run(self) -> int:
        """Units of one processor; the last may have fewer."""
        return -(-self.units // self.processors)

    @property
    def blocks(self) -> int:
        """Processors that have any."""
        return -(-self.units // self.run)

    @property
    def slots(self) -> int:
        """Partial sums of a tile at most."""
        tiles = range(self.token_tiles * self.output_tiles)
        return max(int(self.last_run(tile)) - int(self.first_run(tile)) + 1 for tile in tiles)

    @property
    def part(self) -> int:
        """Inputs that are summed up before their scale is applied."""
        return STEP if self.group is None else min(self.group, STEP)

    def first_run(self, tile: Any) -> Any:
        """The run that has a tile's first step; of ints or arrays of them, not negative."""
        return _divided(tile * self.steps, self.run)

    def last_run(self, tile: Any) -> Any:
        """The run that has a tile's last step."""
        return _divided(tile * self.steps + self.steps - 1, self.run)


def _divided(a: Any, b: int) -> Any:
    # arrays' floor division looks after signs
    return a // b if isinstance(a, int) else jax.lax.div(a, jax.numpy.full_like(a, b))


def schedule_for(m: int, k: int, n: int, group: int | None) -> Schedule:
    """The schedule of a product on this process's GPU, on an H100 where it has none."""
    tokens = next((tile for tile in _TILES if m <= tile), max(_TILES))
    warpgroups, stages = _TILES[tokens]
    device = jax.devices()[0]
    processors = device.core_count if device.platform == "gpu" else H100_PROCESSORS
    return Schedule(m, k, n, group, tokens, warpgroups, stages, processors)

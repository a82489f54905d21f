"""Where a QTensor's arrays go on a mesh, given where the parameter that it stands for is."""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fpq_jax._numerics.qtensor import Axes, QTensor


def placed(q: QTensor, leaf: Any) -> QTensor:
    """``q`` on the devices of ``leaf``, an array, divided over them as it is; where that is uneven, whole."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return q if sharding is None else jax.device_put(q, sharding)
    return jax.device_put(q, shardings_like(q, sharding))


def shardings_like(q: QTensor, sharding: NamedSharding) -> QTensor:
    """The shardings of ``q``'s arrays. ``q`` may be of shapes; ``axes`` it must have."""
    assert q.axes is not None
    names = list(sharding.spec) + [None] * (len(q.axes.kinds) - len(sharding.spec))
    stack, inputs, outputs = (_names(q.axes, names, kind) for kind in ("stack", "in", "out"))
    # several axes that became one are divided as their first one is
    into, out = inputs[:1] or [None], outputs[:1] or [None]
    rows = lambda second: lambda a: _even(a, [*stack, *out, *second], sharding)
    columns = [None]
    specs = {name: jax.tree.map(rows(into), getattr(q, name)) for name in ("codes", "exponents", "group_scale", "zero")}
    low_rank = q.low_rank
    if low_rank is not None:
        low_rank = replace(
            low_rank,
            a=_even(low_rank.a, [*stack, *into, *columns], sharding),
            b=_even(low_rank.b, [*stack, *columns, *out], sharding),
            scale=None if low_rank.scale is None else _even(low_rank.scale, [*stack, *columns], sharding),
        )
    static = lambda a: _even(a, [*stack, *columns], sharding)
    return replace(
        q,
        **specs,
        row_scale=jax.tree.map(rows(columns), q.row_scale),
        input_scale=jax.tree.map(static, q.input_scale),
        input_zero=jax.tree.map(static, q.input_zero),
        low_rank=low_rank,
    )


def _names(axes: Axes, names: list[Any], kind: str) -> list[Any]:
    return [name for name, own in zip(names, axes.kinds, strict=True) if own == kind]


def _even(array: Any, names: list[Any], sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array by its axes' names, without those that do not divide it."""
    mesh = sharding.mesh

    def divides(size: int, name: Any) -> bool:
        devices = 1
        for one in (name if isinstance(name, tuple) else (name,)) if name is not None else ():
            devices *= mesh.shape[one]
        return size % devices == 0

    spec = [name if divides(size, name) else None for size, name in zip(array.shape, names, strict=True)]
    return NamedSharding(mesh, P(*spec))

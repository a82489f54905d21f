"""Where a QTensor's arrays go on a mesh, given how its inputs, outputs and stack are divided.

Codes are divided over both, scales and exponents of groups too, row factors over outputs, LoRC's A over inputs and its
B over outputs. An array that cannot be cut there is whole: packed codes where a byte would be cut, scales where a group
would be.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpq_jax._numerics.qtensor import Axes, QTensor

MeshAxis = Any  # of a PartitionSpec: a name, several, or None


def qtensor_specs(
    q: QTensor,
    mesh: Mesh | AbstractMesh,
    *,
    inputs: MeshAxis = None,
    outputs: MeshAxis = None,
    stack: Sequence[MeshAxis] = (),
) -> QTensor:
    """The PartitionSpec of each array of ``q``, which may be of shapes; ``inputs``, ``outputs`` and each axis of its
    stack are divided over these axes of the mesh."""
    stack = [*stack, *[None] * (len(q.stack) - len(stack))]
    length, in_features = q.spec.group_length(q.shape[0]), q.shape[0]
    groups = inputs if in_features % _devices(inputs, mesh) == 0 else None
    groups = groups if (in_features // _devices(groups, mesh)) % length == 0 else None

    def spec(array: Any, *axes: MeshAxis) -> P:
        named = zip(array.shape, [*stack, *axes], strict=True)
        even = [axis if size % _devices(axis, mesh) == 0 else None for size, axis in named]
        while even and even[-1] is None:
            even.pop()
        return P(*even)

    def specs(name: str, *axes: MeshAxis) -> Any:
        array = getattr(q, name)
        return None if array is None else spec(array, *axes)

    low_rank = q.low_rank
    if low_rank is not None:
        scale = None if low_rank.scale is None else spec(low_rank.scale, None)
        low_rank = replace(low_rank, a=spec(low_rank.a, inputs, None), b=spec(low_rank.b, None, outputs), scale=scale)
    return replace(
        q,
        codes=specs("codes", outputs, inputs),
        row_scale=specs("row_scale", outputs, None),
        exponents=specs("exponents", outputs, groups),
        group_scale=specs("group_scale", outputs, groups),
        zero=specs("zero", outputs, groups),
        input_scale=specs("input_scale", None),
        input_zero=specs("input_zero", None),
        low_rank=low_rank,
    )


def shardings_like(q: QTensor, sharding: NamedSharding) -> QTensor:
    """The shardings of ``q``'s arrays where the parameter that it stands for has this one. ``q`` may be of shapes;
    ``axes`` it must have."""
    assert q.axes is not None
    names = list(sharding.spec) + [None] * (len(q.axes.kinds) - len(sharding.spec))
    stack, inputs, outputs = (_names(q.axes, names, kind) for kind in ("stack", "in", "out"))
    # several axes that became one are divided as their first one is
    first = lambda names: names[0] if names else None
    specs = qtensor_specs(q, sharding.mesh, inputs=first(inputs), outputs=first(outputs), stack=stack)
    return jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def shard_like(q: QTensor, leaf: Any) -> QTensor:
    """``q`` on the devices of ``leaf``, an array, divided over them as it is; where that is uneven, whole."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return q if sharding is None else jax.device_put(q, sharding)
    return jax.device_put(q, shardings_like(q, sharding))


def _names(axes: Axes, names: list[Any], kind: str) -> list[Any]:
    return [name for name, own in zip(names, axes.kinds, strict=True) if own == kind]


def _devices(axis: MeshAxis, mesh: Mesh | AbstractMesh) -> int:
    """Over how many something is divided."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)

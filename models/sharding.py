"""How a model's parameters lie on a mesh: each Linear divided over the "model" axis by its outputs or by its inputs.

By outputs: query, key, value, gate, up, the first of OPT's two, and the head; a device has whole heads and its own part
of the vocabulary, and nothing is sent. By inputs: what takes these; its products are sums that all devices add up. A
model class says which in SPLIT. What it does not name is on every device, and so is a vocabulary that the axis does
not divide.
"""

import re
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpq_jax._errors import FpqError
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._numerics.qtensor_sharding import qtensor_specs
from fpq_jax._support.mesh import MODEL, check_mesh
from fpq_jax._support.trees import Flat

Split = Literal["outputs", "inputs"]


def shardings(model_class: Any, config: Any, params: Flat, mesh: Mesh | AbstractMesh) -> Flat:
    """Path of each parameter -> its NamedSharding on ``mesh``; for a QTensor, a QTensor of them.

    ``params``: arrays or ShapeDtypeStructs and QTensors of either. FpqError if the "model" axis does not divide
    the model.
    """
    check_divisible(model_class, config, mesh)
    return {path: sharding(model_class, path, leaf, mesh) for path, leaf in params.items()}


def check_divisible(model_class: Any, config: Any, mesh: Mesh | AbstractMesh) -> None:
    """FpqError naming a size of the model that the "model" axis does not divide."""
    check_mesh(mesh)
    devices = mesh.shape[MODEL]
    for name in model_class.DIVISIBLE:
        if (size := getattr(config, name)) % devices:
            raise FpqError(
                f"{name} is {size}, which the mesh's model axis of {devices} does not divide; choose one that does."
            )


def split_of(model_class: Any, name: str) -> Split | None:
    """How the Linear or table of this attribute's name is divided; None: it is on every device."""
    for how, pattern in model_class.SPLIT.items():
        if re.fullmatch(pattern, name):
            return how
    return None


def sharding(model_class: Any, path: str, leaf: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The NamedSharding of one parameter, or a QTensor of them."""
    *_, module, part = ("", *path.split("."))
    specs = _specs(leaf, part, split_of(model_class, module), mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def _specs(leaf: Any, part: str, how: Split | None, mesh: Mesh | AbstractMesh) -> Any:
    devices = mesh.shape[MODEL]
    if isinstance(leaf, QTensor):
        axis = {"inputs": 0, "outputs": 1}.get(how or "")
        if how is None or axis is None or leaf.shape[axis] % devices:
            return qtensor_specs(leaf, mesh)
        return qtensor_specs(leaf, mesh, **{how: MODEL})
    # the dimension of outputs is a kernel's second, and a table's or a bias's first; all devices add an input's bias
    axis = {"outputs": int(part == "kernel"), "inputs": 0 if part == "kernel" else None}.get(how or "")
    if axis is None or leaf.shape[axis] % devices:
        return P()
    return P(*(None,) * axis, MODEL)

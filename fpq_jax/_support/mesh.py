"""Devices as a mesh of two axes: "data" divides what is computed on, "model" the weights.

Quantizing and evaluating hold one layer at a time and divide windows over all devices, both axes alike; generation
divides rows over "data" and weights over "model".
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from fpq_jax._errors import FpqError

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """Makes a mesh of the first ``data * model`` devices, with the axes "data" and "model".

    The "data" axis divides what is computed on, "model" the weights. Devices of one "model" group are beside each
    other.

    Args:
        data: size of the axis "data".
        model: size of the axis "model".

    Returns:
        The mesh.

    Raises:
        FpqError: a size is less than 1, there are not so many devices, or a process would be left without a device.

    Example:
        >>> mesh = fpq.make_mesh(data=1, model=1)
        >>> mesh.axis_names, mesh.size
        (('data', 'model'), 1)
    """
    if data < 1 or model < 1:
        raise FpqError(f"The mesh data={data},model={model} is empty; each axis needs at least 1.")
    devices = jax.devices()
    count = data * model
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise FpqError(
            f"The mesh data={data},model={model} needs {count} devices and there are {len(devices)}"
            f"{f' in {jax.process_count()} processes, which must all have a part' if jax.process_count() > 1 else ''}; "
            "name axes whose product fits."
        )
    return Mesh(np.array(devices[:count]).reshape(data, model), AXES)


def parse_mesh(text: str | None) -> Mesh:
    """The mesh that "data=4,model=2" (an axis may be left out) describes; None: all processes' devices as data, or,
    in one process, its first device."""
    if text is None:
        return make_mesh(data=len(jax.devices()) if jax.process_count() > 1 else 1)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdigit() or name.strip() in sizes:
            raise FpqError(f"--mesh is {text!r}; write it as data=4,model=2.")
        sizes[name.strip()] = int(size)
    return make_mesh(**sizes)


def abstract_mesh(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """Its axes without the devices: what programs hold, so that they can be compiled for others.

    XLA propagates shardings over all of them (``AxisType.Auto``), whatever JAX's default is.
    """
    names = tuple(mesh.axis_names)
    return AbstractMesh(tuple(mesh.shape.values()), names, axis_types=(AxisType.Auto,) * len(names))


def over_model(function: Any, mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Any:
    """``function`` of each device's parts under the "model" axis; what the specs leave out is for XLA to divide.

    Inside another ``shard_map`` that one's mesh counts, which may have other devices or none.
    """
    context = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function,
        mesh=mesh if context.empty else None,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={MODEL},
        check_vma=False,
    )


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """FpqError for a mesh without the two axes."""
    if tuple(mesh.axis_names) != AXES:
        raise FpqError(f"The mesh has axes {', '.join(map(str, mesh.axis_names))}; make one with fpq_jax.make_mesh.")


def mesh_text(mesh: Mesh) -> str:
    """As ``parse_mesh`` reads it."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def start_processes() -> None:
    """Join the other processes of this command, by ``jax.distributed``.

    A cluster that JAX knows (Slurm, Open MPI, Cloud TPU, ...) tells who is who; elsewhere the environment's
    JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do. FpqError if
    neither does.
    """
    if jax.distributed.is_initialized():
        return
    numbers: dict[str, Any] = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text is not None and not text.isdigit():
            raise FpqError(f"JAX_{name.upper()} is {text!r}; it must be a number.")
        numbers[name] = None if text is None else int(text)
    try:
        jax.distributed.initialize(**numbers)
    except (ValueError, RuntimeError) as error:
        raise FpqError(
            f"The processes cannot be joined ({str(error).partition(chr(10))[0]}); set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or leave --distributed out."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and keeps records."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of every process's float64 ``values``, in each of them."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    bits = multihost_utils.process_allgather(values.view(np.int32))  # JAX would round float64
    return np.asarray(bits).view(np.float64).sum(axis=0)


def in_every_process(true: bool) -> bool:
    """Whether this is so in all of them."""
    return bool(sum_over_processes(np.array([float(true)]))[0] == jax.process_count())


def from_first(value: Any) -> Any:
    """The first process's plain data, in each of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    sent = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    buffer = sent if is_first() else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def several_processes() -> bool:
    """Whether there are others that wait for this one; asks no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1

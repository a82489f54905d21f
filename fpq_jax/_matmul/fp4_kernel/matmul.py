"""FP8 activations times a weight in fragments: the kernel on a GPU, its arithmetic in plain JAX on a CPU."""

from functools import partial

import jax
from jaxtyping import Array, Float, Shaped

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel import reference
from fpq_jax._matmul.fp4_kernel.fragments import Fragments, group_length, table
from fpq_jax._matmul.fp4_kernel.schedule import Schedule, schedule_for

_HOPPER = "9.0"


def check_device() -> None:
    """FpqError where neither the kernel nor its arithmetic in plain JAX can run."""
    device = jax.devices()[0]
    if device.platform == "cpu" or (device.platform == "gpu" and str(device.compute_capability) == _HOPPER):
        return
    raise FpqError(
        f"The kernel is for Hopper (H100, H200), and this is {device.device_kind}; use weights fp8 or packed."
    )


def notice() -> str:
    """What a person who asked for the kernel is to know."""
    where = "" if jax.devices()[0].platform == "gpu" else ", and on this machine plain JAX computes what it would"
    return f"weights fragments: the kernel is compiled and checked for Hopper but not yet measured on a GPU{where}."


def matmul(x: Shaped[Array, "m in"], f: Fragments, schedule: Schedule | None = None) -> Float[Array, "m out"]:
    """x (float8_e4m3fn) times the weight, in float32; the rows' factors and LoRC are not in it."""
    from fpq_jax._matmul.fp4_kernel import mosaic  # Pallas is heavy, and rarely asked for

    s = schedule or schedule_for(len(x), *f.shape, group_length(f.spec, f.shape[0]))
    forms = {"cuda": mosaic.partial_sums, "default": reference.partial_sums}
    forms = {name: partial(form, table=table(f.spec.format), s=s) for name, form in forms.items()}
    with jax.enable_x64(False):  # the kernel counts in int32
        return reference.added_up(jax.lax.platform_dependent(x, f.words, f.group_scale, **forms), s)

"""The layouts in which weights stay in memory while a model runs, and the change to them.

- "fp8": whatever has an FP8 form is expanded to it, a byte per weight, and padded to FP8's multiple: fastest.
- "packed": 4-bit codes stay packed, half a byte per weight, and are expanded inside each product: for models that would
  not fit otherwise, and where many tokens share the expansion;
- "fragments": 4-bit codes are laid out for our own kernel (see ``fp4_kernel``), half a byte per weight, and not
  expanded where the tokens are few. It has not been measured: no GPU has run it yet.

All are exact, so they give the same results ("fragments" but for the order of float32 sums, and without the rounding to
bfloat16 of weights with free scales).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from fpq_jax._errors import FpqError
from fpq_jax._matmul.fp4_kernel.fragments import Fragments, fragments, of_fragments, takes
from fpq_jax._matmul.fp4_kernel.matmul import check_device
from fpq_jax._matmul.products import FP8_MULTIPLE, product_kind
from fpq_jax._numerics.qtensor import QTensor, expand, pad_to

WeightLayout = Literal["fp8", "packed", "fragments"]


def check_layout(layout: Any, devices: int | None = None) -> None:
    """FpqError for other names, and for the kernel where it cannot be; ``devices``: of a mesh, if there is one."""
    if layout not in get_args(WeightLayout):
        raise FpqError(f"weights is {layout!r}; it must be {', '.join(get_args(WeightLayout)[:-1])} or fragments.")
    if layout == "fragments":
        check_device()
        if devices is not None:
            raise FpqError("The kernel multiplies on one device, without a mesh; use weights fp8 or packed.")


def check_any_for_fragments(leaves: Iterable[Any], layout: str) -> None:
    """FpqError if our kernel is asked for and none of a model's parameters is for it."""
    fits = lambda leaf: isinstance(leaf, Fragments) or (isinstance(leaf, QTensor) and takes(leaf))
    if layout == "fragments" and not any(map(fits, leaves)):
        raise FpqError(
            "No weight here is for the kernel, which multiplies weights in nf4, e2m1, e3m0 or int4 by activations in "
            "e4m3; use weights fp8 or packed."
        )


def to_layout(kernel: Any, layout: str, *, pad: bool = True) -> Any:
    """A kernel in the layout in which it stays in memory; arrays, and weights without an FP8 form, stay as they are.
    With "fragments", what our kernel is not for is as with "fp8".

    ``pad`` False leaves padding to ``linear``: zeros behind the last row or column would move the parts of a weight
    that is divided over devices.
    """
    if not isinstance(kernel, QTensor | Fragments):
        return kernel
    kernel = of_fragments(kernel)
    if layout == "fragments" and takes(kernel):
        return fragments(kernel)
    if layout != "packed" and kernel.has_fp8_form and product_kind(kernel) != "int8":
        kernel = expand(kernel)
    if pad and kernel.spec.format.is_float8 and product_kind(kernel) == "fp8":
        kernel = replace(kernel, codes=pad_to(kernel.codes, FP8_MULTIPLE, FP8_MULTIPLE))
    return kernel


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a QTensor, or one laid out for our kernel."""
    return isinstance(leaf, QTensor | Fragments)

"""A kernel of our own: 4-bit weights times FP8 activations on Hopper's tensor cores, without an FP8 copy in memory.

``_fragments`` lays the codes out as the kernel's threads want them, ``_schedule`` divides the product among the
processors, ``_mosaic`` is the kernel (Pallas on the Mosaic GPU backend), ``_tiles`` the same arithmetic in plain JAX,
``_matmul`` the function that chooses between the two. It has not been run on a GPU yet, so nothing uses it unless it is
asked for (``expand="kernel"``).
"""

from fpq_jax.kernels._fragments import Fragments, fragments, of_fragments, takes
from fpq_jax.kernels._matmul import check_device, matmul, notice
from fpq_jax.kernels._schedule import MOST_TOKENS

__all__ = ["MOST_TOKENS", "Fragments", "check_device", "fragments", "matmul", "notice", "of_fragments", "takes"]

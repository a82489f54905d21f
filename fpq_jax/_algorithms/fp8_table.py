"""A table of token vectors, and a head, in FP8: E4M3 with a scale for each token that is a power of two.

E4M3 is a float format, so a power of two costs nothing as long as a vector's values are within its 18 binades; and what
a code stands for is exact in bfloat16, so that a table that is read, multiplied or exported in 16 bits is the same one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fpq_jax._numerics.formats import E4M3, Format, encode
from fpq_jax._numerics.qtensor import QTensor
from fpq_jax._numerics.scales import ceil_log2_ratio, power_of_two
from fpq_jax._numerics.spec import QuantSpec

_SMALLEST, _LARGEST = -100, 100  # exponents: the scales, and products with a token's, stay normal float32s


@partial(jax.jit, static_argnames="activation")
def quantize_table(table: Float[Array, "V D"], activation: Format | None) -> QTensor:
    """The QTensor of logical shape [D, V] whose outputs are the rows of ``table``.

    ``activation``: of what a head meets, None to leave it alone.
    """
    table = table.astype(jnp.float32)
    largest = jnp.max(jnp.abs(table), axis=1, keepdims=True)
    exponent = jnp.clip(ceil_log2_ratio(largest, jnp.full_like(largest, E4M3.max)), _SMALLEST, _LARGEST)
    scale = jnp.where(largest > 0, power_of_two(exponent), 1.0)
    spec = QuantSpec(format=E4M3, group_size="channel", activation=activation)
    tokens, size = table.shape
    return QTensor(encode(table / scale, E4M3), row_scale=scale, spec=spec, shape=(size, tokens))

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_concatenate import SPECS, several, weight

from fpq_jax import FpqError, dequantize, linear, quantize_array
from fpq_jax._matmul.linear import linears
from fpq_jax._matmul.weight_layouts import check_layout, to_layout


@pytest.mark.parametrize("spec", SPECS, ids=["m2", "m1", "free", "w8", "int4", "int8"])
def test_both_residencies_are_the_weight_and_multiply_alike(spec):
    x = jnp.asarray(np.random.default_rng(9).standard_normal((3, 100)), jnp.float32)
    q = several(spec)[0]
    multiply = jax.jit(linear)
    fp8, packed = to_layout(q, "fp8"), to_layout(q, "packed")
    for form in (fp8, packed):
        np.testing.assert_array_equal(dequantize(form), dequantize(q))
        np.testing.assert_array_equal(multiply(x, form), multiply(x, q))
    if spec == SPECS[0]:
        # 100 inputs and 24 outputs, padded to multiples of 16
        assert fp8.codes.shape == (32, 112) and fp8.codes.dtype == jnp.float8_e4m3fn and fp8.exponents is None
        assert packed is q


def test_arrays_and_unknown_residencies():
    w = weight(3)
    assert to_layout(w, "fp8") is w
    for name in ("later", None, 3):
        with pytest.raises(FpqError, match="it must be fp8, packed or fragments"):
            check_layout(name)


def test_one_input_is_quantized_once_for_all_that_take_it_alike():
    x = jnp.ones((3, 100))
    reductions = lambda kernels: str(jax.make_jaxpr(lambda x: linears(x, [(k, None) for k in kernels]))(x)).count(
        "reduce_max"
    )
    assert reductions(several(SPECS[0])) == 1
    mixed = [several(SPECS[0])[0], quantize_array(weight(5), SPECS[3]), weight(4)]
    assert reductions(mixed) == 1
    other = quantize_array(weight(5), dataclasses.replace(SPECS[3], activation="e5m2"))
    assert reductions([*mixed, other]) == 2

"""A kernel's layout against NumPy: what an array's axes are after any transposes and reshapes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpq_jax import Axes
from fpq_jax._transform.axis_layout import Layout, Product, laid_out, matmul_form, to_kernel


def _factors_of(array, shape):
    """The parameter's index that each element of ``array`` came from, if it began as an arange."""
    return np.stack(np.unravel_index(np.asarray(array, int), shape))


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_of_a_kernel_are_followed(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6, 8], rng.integers(2, 5)))
    array, layout = np.arange(math.prod(shape)).reshape(shape), Layout.of(shape)
    for _ in range(6):
        if rng.random() < 0.5:
            order = rng.permutation(array.ndim)
            array, layout = array.transpose(order), layout.transposed(order.tolist())
        else:
            new = _random_shape(rng, array.shape)
            moved = layout.reshaped(new)
            if moved is None:  # an axis of the result is of parts of two factors that do not divide
                assert any(n not in _products(array.shape) for n in new)
                continue
            array, layout = array.reshape(new), moved
        assert layout.shape == array.shape
    kinds = tuple(rng.permutation(["in", "out", *rng.choice(["in", "out", "stack"], len(shape) - 2)]).tolist())
    axes = Axes.of(kinds, shape, "float32")
    kernel = to_kernel(np.arange(math.prod(shape)).reshape(shape), axes)
    np.testing.assert_array_equal(laid_out(kernel, layout, axes), array)


def _random_shape(rng, shape):
    """Axes joined, split or of size 1 put between."""
    axis = int(rng.integers(len(shape)))
    choice = rng.integers(3)
    if choice == 0 and len(shape) > 1:
        axis = min(axis, len(shape) - 2)
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    if choice == 1 and shape[axis] % 2 == 0:
        return (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])
    return (*shape[:axis], 1, *shape[axis:])


def _products(shape):
    return {math.prod(shape[i:j]) for i in range(len(shape)) for j in range(i + 1, len(shape) + 1)}


def test_axes_that_are_no_products_of_factors_are_refused():
    assert Layout.of((2, 3)).reshaped((3, 2)) is None
    assert Layout.of((4, 3)).reshaped((2, 6)).shape == (2, 6)
    assert Layout.of((4, 3)).reshaped((2, 6)).reshaped((4, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    ("x", "w", "kinds", "numbers"),
    [
        ((5, 6), (6, 7), ("in", "out"), (((1,), (0,)), ((), ()))),
        ((2, 5, 6), (7, 6), ("out", "in"), (((2,), (1,)), ((), ()))),
        ((6, 5), (6, 7), ("in", "out"), (((0,), (0,)), ((), ()))),
        ((2, 3, 4), (3, 4, 7), ("in", "in", "out"), (((1, 2), (0, 1)), ((), ()))),
        ((2, 4, 3), (3, 4, 7), ("in", "in", "out"), (((2, 1), (0, 1)), ((), ()))),
        ((2, 6), (3, 6, 5), ("out", "in", "out"), (((1,), (1,)), ((), ()))),
        ((2, 5, 6), (2, 6, 7), ("stack", "in", "out"), (((2,), (1,)), ((0,), (0,)))),
        ((5, 2, 6, 4), (2, 6, 7, 4), ("stack", "in", "out", "stack"), (((2,), (1,)), ((3, 1), (3, 0)))),
        ((5, 6), (2, 6, 7), ("stack", "in", "out"), (((1,), (1,)), ((), ()))),
    ],
)
@pytest.mark.parametrize("kernel_first", [False, True])
def test_a_plan_makes_any_product_one_of_matrices(x, w, kinds, numbers, kernel_first):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(x).astype(np.float32), rng.standard_normal(w).astype(np.float32)
    if kernel_first:
        numbers = tuple(tuple(reversed(part)) for part in numbers)
    expected = jax.lax.dot_general(*((w, x) if kernel_first else (x, w)), numbers)
    axes = Axes.of(kinds, w.shape, "float32")
    product = Product.of(numbers, kernel_first)
    form = matmul_form(x.shape, Layout.of(w.shape), axes, product)
    rows, kernel = form.of_x(jnp.asarray(x)), to_kernel(jnp.asarray(w), axes)
    multiply = lambda x, w: x @ w
    for shared in reversed(form.shared):
        multiply = jax.vmap(multiply, in_axes=(0 if shared else None, 0))
    np.testing.assert_allclose(form.of_result(multiply(rows, kernel)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(form.of_x.undone(rows, x.shape), x)
    found = product.kinds(Layout.of(w.shape))
    assert [found[i] if kind != "stack" else "stack" for i, kind in enumerate(kinds)] == list(kinds)


def test_products_over_anything_but_the_inputs_have_no_plan():
    axes = Axes.of(("in", "out"), (6, 7), "float32")
    over_outputs = Product.of((((1,), (1,)), ((), ())), False)
    assert matmul_form((5, 7), Layout.of((6, 7)), axes, over_outputs) is None
    split = Layout.of((6, 7)).reshaped((2, 3, 7))
    assert matmul_form((5, 3), split, axes, Product.of((((1,), (1,)), ((), ())), False)) is None
    assert Product.of((((1,), (1,)), ((), ())), False).kinds(split) is None

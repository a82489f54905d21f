from fpq_jax import FpqError


def test_it_is_a_value_error_so_that_libraries_can_catch_it():
    assert issubclass(FpqError, ValueError)

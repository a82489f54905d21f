import pytest

from fpq_jax import FpqError
from fpq_jax._errors import check_at_least


def test_it_is_a_value_error_so_that_libraries_can_catch_it():
    assert issubclass(FpqError, ValueError)


def test_numbers_too_small_name_their_flag():
    check_at_least(1, num_samples=1, max_windows=None)
    with pytest.raises(FpqError, match=r"--num-samples is 0; it must be at least 1"):
        check_at_least(1, max_windows=4, num_samples=0)

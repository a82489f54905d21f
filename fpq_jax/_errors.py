"""The one exception a person may cause: bad input, described in one sentence."""


class FpqError(ValueError):
    """Reports input that cannot be used: the message names what is wrong and what to do about it.

    It is a ``ValueError``. The commands print its message and exit with status 2.

    Example:
        >>> try:
        ...     fpq.QuantSpec(format="e2m1", group_size=0)
        ... except fpq.FpqError as error:
        ...     print(error)
        group_size is 0; it must be a positive number, "channel" or "tensor".
    """


def check_at_least(least: int, **flags: int | None) -> None:
    """FpqError if a command's number (None: not given) is smaller than ``least``; the flag is named."""
    for name, value in flags.items():
        if value is not None and value < least:
            raise FpqError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")


def check_seed(seed: int) -> None:
    """FpqError for a seed that random numbers cannot be made of."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise FpqError(f"seed is {seed}; it must be from 0 to {2**31 - 1}.")

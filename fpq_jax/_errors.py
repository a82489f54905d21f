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

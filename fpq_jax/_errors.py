"""The one exception a person may cause: bad input, told in one sentence."""


class FpqError(ValueError):
    """Input that cannot be used. The message names the thing and the remedy; commands exit with status 2 on it."""


def check_at_least(least: int, **flags: int | None) -> None:
    """FpqError if a command's number (None: not given) is smaller than ``least``; the flag is named."""
    for name, value in flags.items():
        if value is not None and value < least:
            raise FpqError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")

"""The one exception a person may cause: bad input, told in one sentence."""


class FpqError(ValueError):
    """Input that cannot be used. The message names the thing and the remedy; commands exit with status 2 on it."""

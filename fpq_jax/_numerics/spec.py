"""QuantSpec: how one weight matrix and the activations that meet it are represented."""

from dataclasses import dataclass, fields
from typing import Literal

from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E2M1, E4M3, Format, get_format

Constraint = Literal["m1", "m2"]
ExponentRounding = Literal["up", "nearest", "search"]
GroupSize = int | Literal["channel", "tensor"]
ActivationScale = Literal["token", "static"]
LARGEST = 2**31 - 1  # of sizes


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Describes how a weight matrix, and the activations that it multiplies, are quantized.

    It is frozen, hashable and checked when it is made.

    Attributes:
        format: of the weight's codes, a ``Format`` or its name.
        group_size: how many weights along the input share a scale, or ``"channel"`` (one scale for each output) or
            ``"tensor"`` (one scale). A last group that is not full is shorter; more than the input dimension means one
            group.
        constraint: None for free scales. ``"m1"`` rounds each scale to a power of two. ``"m2"`` rounds it to a power of
            two times the largest scale of its compute group, so that an output row expands exactly to ``float8_e4m3fn``
            with one factor (ZeroQuant-FP, section 3). For symmetric 4-bit formats.
        exponent_rounding: which power of two: ``"up"`` (no weight saturates), ``"nearest"`` (in log2) or ``"search"``
            (the least squared error, weighted with the Hessian's diagonal where there is one).
        compute_rows: how many output rows form a compute group of M2.
        activation: format of the quantized activations, a ``Format`` or its name; None to leave them as they are.
        activation_scale: ``"token"`` (a scale for each token, computed when it comes) or ``"static"`` (one scale for
            the tensor, from the largest value seen in calibration).

    Raises:
        FpqError: a field has an impossible value, or two fields contradict each other.

    Example:
        >>> spec = fpq.QuantSpec(format="e2m1", group_size=128, constraint="m2")
        >>> spec.activation
        e4m3
        >>> spec.num_groups(4096)
        32
    """

    format: Format = E2M1
    group_size: GroupSize = 256
    constraint: Constraint | None = None
    exponent_rounding: ExponentRounding = "up"
    compute_rows: int = 1
    activation: Format | None = E4M3
    activation_scale: ActivationScale = "token"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        if self.activation is not None:
            object.__setattr__(self, "activation", get_format(self.activation))
        if self.activation_scale not in ("token", "static"):
            raise FpqError(f"activation_scale is {self.activation_scale!r}; it must be token or static.")
        if self.activation is None and self.activation_scale == "static":
            raise FpqError("activation_scale static has no meaning for activations that are left alone.")
        size = self.group_size
        if size not in ("channel", "tensor") and not (
            isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST
        ):
            raise FpqError(f'group_size is {size!r}; it must be a positive number, "channel" or "tensor".')
        if self.constraint not in (None, "m1", "m2"):
            raise FpqError(f"constraint is {self.constraint!r}; it must be m1, m2 or nothing.")
        if self.exponent_rounding not in ("up", "nearest", "search"):
            raise FpqError(f"exponent_rounding is {self.exponent_rounding!r}; it must be up, nearest or search.")
        rows = self.compute_rows
        if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows <= LARGEST:
            raise FpqError(f"compute_rows is {self.compute_rows!r}; it must be a positive number of output rows.")
        if self.constraint and not self.format.packed:
            raise FpqError(f"constraint {self.constraint} is for 4-bit formats; {self.format} is already 8 bits wide.")
        if self.constraint and self.format.asymmetric:
            raise FpqError(f"constraint {self.constraint} has no FP8 form under zero points; use int4 for int4-asym.")
        if self.constraint and size == "tensor":
            raise FpqError(f'constraint {self.constraint} is about several scales; group_size "tensor" has one.')
        if self.compute_rows > 1 and self.constraint != "m2":
            raise FpqError("compute_rows is for constraint m2 only.")

    def to_dict(self) -> dict[str, str | int | None]:
        """Converts the spec to plain data, of which ``QuantSpec(**data)`` makes the same spec.

        Returns:
            A dict of the fields, formats by name.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.name if isinstance(value, Format) else value for name, value in values.items()}

    def group_length(self, in_features: int) -> int:
        """Counts the inputs that share a scale.

        Args:
            in_features: inputs of the weight.

        Returns:
            The inputs of a full group.
        """
        return in_features if isinstance(self.group_size, str) else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Counts the scales of an output row.

        Args:
            in_features: inputs of the weight.

        Returns:
            The groups of a row, the last one included where it is not full.
        """
        return -(-in_features // self.group_length(in_features))

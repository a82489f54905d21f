"""QuantSpec: how one weight matrix and the activations that meet it are represented."""

from dataclasses import dataclass, fields
from typing import Literal

from fpq_jax._errors import FpqError
from fpq_jax._numerics.formats import E2M1, E4M3, Format, get_format

Constraint = Literal["m1", "m2"]
ExponentRounding = Literal["up", "nearest", "search"]
ActivationScale = Literal["token", "static"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Format, scales and activations of one quantized Linear. Checked when made: FpqError names what is wrong.

    format: of the weight's codes, a Format or its name.
    group_size: weights along the input that share a scale, or "channel" (one scale an output) or "tensor".
        A last group that it does not fill is shorter; more than the input dimension means one group.
    constraint: None for free scales; "m1" rounds each to a power of two; "m2" to a power of two times the largest
        scale of its compute group, so that a row expands exactly to float8_e4m3fn under one factor.
    exponent_rounding: which power: "up" (nothing clips), "nearest" (in log2), "search" (least weighted error).
    compute_rows: output rows of one compute group of M2.
    activation: format of the quantized activations, None to leave them alone.
    activation_scale: "token" (a scale for each token, taken when it comes) or "static" (one for the whole tensor, from
        the largest value seen in calibration).
    """

    format: Format = E2M1
    group_size: int | Literal["channel", "tensor"] = 256
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
            isinstance(size, int) and not isinstance(size, bool) and size > 0
        ):
            raise FpqError(f'group_size is {size!r}; it must be a positive number, "channel" or "tensor".')
        if self.constraint not in (None, "m1", "m2"):
            raise FpqError(f"constraint is {self.constraint!r}; it must be m1, m2 or nothing.")
        if self.exponent_rounding not in ("up", "nearest", "search"):
            raise FpqError(f"exponent_rounding is {self.exponent_rounding!r}; it must be up, nearest or search.")
        rows = self.compute_rows
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
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
        """Plain data; QuantSpec(**spec.to_dict()) is the same spec."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.name if isinstance(value, Format) else value for name, value in values.items()}

    def group_length(self, in_features: int) -> int:
        """Inputs per scale of a weight with ``in_features`` inputs."""
        return in_features if isinstance(self.group_size, str) else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Scales per output row."""
        return -(-in_features // self.group_length(in_features))

"""Rotary positions: the frequencies and factor that a config.json asks for, and turning queries and keys by them.

Scaling is as Transformers has it: "linear", "dynamic" (which within the model's positions changes nothing), "llama3",
and "yarn" (Peng et al., 2023, arXiv 2309.00071).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fpq_jax._errors import FpqError
from fpq_jax.models.config import ConfigValues

_THETA = 10000.0
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
Scaling = tuple[tuple[str, Any], ...]  # "rope_type" and what belongs to it; empty for none


def read_rotary(config: Mapping[str, Any], max_positions: int) -> tuple[float, Scaling]:
    """(base of the frequencies, scaling) of a config.json. FpqError names what is not supported.

    Transformers 5 writes all of it into rope_parameters, 4 wrote rope_theta and rope_scaling.
    """
    values = ConfigValues(config)
    _check_not_partial(values)
    told = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    found = [_read(values, key, max_positions) for key in told] or [(values.number("rope_theta", _THETA), ())]
    if any(one != found[0] for one in found):
        raise FpqError("config.json: rope_parameters and rope_scaling say different things; remove the wrong one.")
    return found[0]


def _read(config: ConfigValues, key: str, max_positions: int) -> tuple[float, Scaling]:
    values = config.of(key)
    if nested := [name for name, value in values.items() if isinstance(value, Mapping)]:
        raise FpqError(f"config.json: {key} of single layers ({', '.join(nested)}) are not supported.")
    theta = values.number("rope_theta", config.number("rope_theta", _THETA))
    _check_not_partial(values)
    kind = values.choice("rope_type" if values.has("rope_type") else "type", _KINDS, "default")
    # pretraining's positions may stand outside, and then count; otherwise they are the model's
    inside = "original_max_position_embeddings"
    original = config.count(inside) if config.has(inside) else values.count(inside, max_positions)
    if kind == "default":
        return theta, ()
    factor = values.number("factor", max_positions / original) if kind == "yarn" else values.number("factor")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        values.require("low_freq_factor", "high_freq_factor")
        low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
        if low >= high:
            raise FpqError(f"config.json: {key}: low_freq_factor {low:g} is not below high_freq_factor {high:g}.")
        scaling |= {"low_freq_factor": low, "high_freq_factor": high, inside: original}
    elif kind == "yarn":
        scaling |= {name: values.number(name, default) for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        scaling |= {name: values.number(name) for name in optional if values.has(name)}
        scaling |= {"truncate": values.flag("truncate", True), inside: original}
    return theta, tuple(scaling.items())


def _check_not_partial(values: ConfigValues) -> None:
    if values.number("partial_rotary_factor", 1.0) != 1.0:
        raise FpqError("config.json: partial_rotary_factor is not supported; all channels of a head are rotated.")


def inverse_frequencies(head_dim: int, theta: float, scaling: Scaling) -> Float[np.ndarray, " half"]:
    """Rotary frequencies per pair of channels, float32, scaled."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.power(np.float32(theta), exponents)).astype(np.float32)
    told = dict(scaling)
    if told.get("rope_type") == "linear":
        frequencies = frequencies / np.float32(told["factor"])
    elif told.get("rope_type") == "llama3":
        frequencies = _llama3(frequencies, told)
    elif told.get("rope_type") == "yarn":
        frequencies = _yarn(frequencies, theta, told)
    return frequencies.astype(np.float32)


def attention_factor(scaling: Scaling) -> float:
    """What cosines and sines are multiplied by; yarn's (its section 3.4), 1 for the others."""
    told = dict(scaling)
    if told.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in told:
        return told["attention_factor"]
    by = lambda mscale: 0.1 * mscale * math.log(told["factor"]) + 1.0 if told["factor"] > 1 else 1.0
    if "mscale" in told and "mscale_all_dim" in told:
        return by(told["mscale"]) / by(told["mscale_all_dim"])
    return by(1.0)


def _llama3(frequencies: np.ndarray, told: Mapping[str, Any]) -> np.ndarray:
    """LLaMA 3.1's: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    low, high = told["low_freq_factor"], told["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    keep = np.clip((told["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / told["factor"] + keep * frequencies


def _yarn(frequencies: np.ndarray, theta: float, told: Mapping[str, Any]) -> np.ndarray:
    """Channels that turn often over pretraining's positions keep their frequency, those that turn less than once are
    divided by the factor, with a linear blend between (section 3.2)."""
    pairs = len(frequencies)
    positions = told["original_max_position_embeddings"]
    channel = lambda turns: pairs * math.log(positions / (turns * 2 * math.pi)) / math.log(theta)
    low, high = channel(told["beta_fast"]), channel(told["beta_slow"])
    if told["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    divided = np.clip((np.arange(pairs, dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequencies / told["factor"] * divided + frequencies * (1 - divided)


def rotate(
    x: Float[Array, "B T H C"],
    positions: Int[Array, "B T"],
    inverse_frequencies: Float[Array, " half"],
    factor: float = 1.0,
) -> Float[Array, "B T H C"]:
    """Rotary position embedding with the halves layout of Hugging Face's LLaMA; angles in float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    cos, sin = ((of(angles) * factor)[:, :, None, :].astype(x.dtype) for of in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""What the quantization_config of a compressed-tensors checkpoint says."""

from collections.abc import Mapping
from typing import Any

from fpq_jax._errors import FpqError
from fpq_jax._storage.compressed_tensors import METHOD, CompressedScheme, Fp8, Int4, Mxfp4

_UNSUPPORTED = ("kv_cache_scheme", "output_activations", "sparsity_config", "transform_config")


def scheme_of(config: Mapping[str, Any]) -> CompressedScheme:
    """The scheme that a quantization_config is about. FpqError names what is not supported."""
    method = config.get("quant_method")
    if method != METHOD:
        raise FpqError(
            f"config.json: checkpoints quantized with {method!r} are not supported, those of {METHOD} are; "
            "name the original."
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        raise FpqError("config.json: a quantization_config must have one config group; name the original checkpoint.")
    (group,) = groups.values()
    for key, value in (*config.items(), *group.items()):
        if key in _UNSUPPORTED and value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise FpqError(f"config.json: {key} in a quantization_config is not supported; name the original.")
    found = group.get("format") or config.get("format")
    known = _schemes(group)
    if not isinstance(found, str) or found not in known:
        weights, activations = (_described(group.get(part)) for part in ("weights", "input_activations"))
        raise FpqError(
            f"config.json: compressed-tensors with {weights} weights, {activations} activations and format {found} is "
            "not supported; FP8 weights by channel or tensor, MXFP4 weights and symmetric INT4 weights in groups are. "
            "Name the original checkpoint."
        )
    return known[found]


def _schemes(group: Mapping[str, Any]) -> dict[str, CompressedScheme]:
    """What a config group can mean, by the format that is beside it."""
    weights = _arguments(group.get("weights"))
    activations = _arguments(group.get("input_activations"))
    size = weights.get("group_size")
    schemes: list[CompressedScheme] = [Mxfp4(), *(Fp8(a, t) for a in ("token", "static", None) for t in (False, True))]
    if isinstance(size, int) and size > 0:
        schemes.append(Int4(size))
    fits = [scheme for scheme in schemes if tuple(map(_arguments, scheme.arguments())) == (weights, activations)]
    return {name: scheme for scheme in fits for name in (scheme.FORMAT, *scheme.ALIASES)}


def _arguments(given: Any) -> dict[str, Any]:
    """What tells schemes apart, absent values filled in as the library does."""
    if not isinstance(given, Mapping):
        return {}
    strategy = given.get("strategy") or ("group" if given.get("group_size") else "tensor")
    size = given.get("group_size") if strategy == "group" else None
    return {
        "num_bits": given.get("num_bits", 8),
        "type": given.get("type", "int"),
        "symmetric": given.get("symmetric", True),
        "strategy": strategy,
        "group_size": size,
        "dynamic": given.get("dynamic", False),
    }


def _described(given: Any) -> str:
    if not isinstance(given, Mapping):
        return "unquantized"
    of = _arguments(given)
    kind = f"{of['num_bits']}-bit {of['type']}{'' if of['symmetric'] else ' asymmetric'} {of['strategy']}"
    size = f" {of['group_size']}" if of["group_size"] else ""
    return f"{kind}{size}{' dynamic' if of['dynamic'] else ''}"

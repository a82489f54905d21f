"""Configurations that compressed-tensors wrote, or might, and ours as it reads them."""

import json

import pytest

from fpq_jax import FpqError
from fpq_jax._storage.compressed_tensors import Fp8, Int4, Mxfp4
from fpq_jax._storage.quantization_config import scheme_of

pytestmark = pytest.mark.full


def test_the_arguments_written_are_those_of_the_library():
    pytest.importorskip("torch", reason="the torch extra is not installed")
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    for preset, scheme in (
        ("FP8_DYNAMIC", Fp8()),
        ("FP8", Fp8("static", True)),
        ("MXFP4A16", Mxfp4()),
        ("W4A16", Int4()),
    ):
        config = scheme.config(["lm_head"])
        parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
        theirs, ours = preset_name_to_scheme(preset, ["Linear"]), parsed.config_groups["group_0"]
        for part in ("weights", "input_activations"):
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
                assert getattr(getattr(theirs, part), key, None) == getattr(getattr(ours, part), key, None), (
                    preset,
                    key,
                )
        assert scheme_of(config) == scheme
        # as the library itself writes it, with all its keys
        dumped = json.loads(
            QuantizationConfig(config_groups={"group_0": theirs}, format=scheme.FORMAT).model_dump_json()
        )
        assert scheme_of(dumped) == scheme


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel"}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quant_method": "awq"}, "quantized with 'awq' are not supported, those of compressed-tensors are"),
        ({"config_groups": {}}, "must have one config group"),
        ({"config_groups": {"FP8": ["Linear"]}}, "must have one config group"),
        ({"config_groups": GROUPS | {"group_1": GROUPS["group_0"]}}, "must have one config group"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme in a quantization_config is not supported"),
        ({"format": ["float-quantized"]}, r"and format \['float-quantized'\] is not supported"),
        ({"format": "nvfp4-pack-quantized"}, "and format nvfp4-pack-quantized is not supported; FP8 weights"),
        (
            {"config_groups": {"group_0": {"weights": WEIGHTS | {"strategy": "block"}}}},
            "with 8-bit float block weights, unquantized activations",
        ),
        (
            {"config_groups": {"group_0": {"weights": WEIGHTS | {"type": "int", "symmetric": False}}}},
            "8-bit int asymmetric channel weights",
        ),
    ],
)
def test_what_is_not_supported_is_named(changed, said):
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": GROUPS}
    assert scheme_of(config) == Fp8(None)
    with pytest.raises(FpqError, match=said):
        scheme_of(config | changed)

import pytest

from fpq_jax import E2M1, FpqError, QuantSpec


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -3}, "group_size is -3"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": "row"}, "group_size is 'row'"),
        ({"format": "fp4"}, "no format 'fp4'"),
        ({"constraint": "m3"}, "constraint is 'm3'"),
        ({"constraint": "m2", "exponent_rounding": "down"}, "exponent_rounding is 'down'"),
        ({"constraint": "m1", "format": "e4m3"}, "for 4-bit formats"),
        ({"constraint": "m1", "group_size": "tensor"}, "several scales"),
        ({"compute_rows": 4}, "m2 only"),
        ({"compute_rows": 0, "constraint": "m2"}, "compute_rows is 0"),
        ({"compute_rows": True, "constraint": "m2"}, "compute_rows is True"),
        ({"format": ["e2m1"]}, "no format"),
        ({"constraint": "m2", "format": "int4-asym"}, "zero points"),
        ({"activation": "int9"}, "no format 'int9'"),
        ({"activation_scale": "row"}, "activation_scale is 'row'"),
        ({"activation": None, "activation_scale": "static"}, "left alone"),
    ],
)
def test_nonsense_is_refused_by_name(options, said):
    with pytest.raises(FpqError, match=said):
        QuantSpec(**options)


def test_plain_data_round_trips():
    spec = QuantSpec(format="e3m0", group_size=64, constraint="m2", compute_rows=2, activation="e5m2")
    assert QuantSpec(**spec.to_dict()) == spec
    assert QuantSpec(format="e2m1").format is E2M1


@pytest.mark.parametrize(("size", "inputs", "groups"), [(256, 700, 3), (256, 40, 1), ("channel", 700, 1), (1, 5, 5)])
def test_groups_cover_the_inputs(size, inputs, groups):
    assert QuantSpec(group_size=size).num_groups(inputs) == groups

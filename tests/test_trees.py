from fpq_jax._support.trees import below, flatten, unflatten


def test_flatten_and_unflatten_are_inverses():
    tree = {"layers": {0: {"a": {"kernel": 1}}, 1: {"a": {"kernel": 2}}}, "norm": {"scale": 3}}
    flat = flatten(tree)
    assert flat == {"layers.0.a.kernel": 1, "layers.1.a.kernel": 2, "norm.scale": 3}
    assert unflatten(flat) == tree


def test_below_cuts_the_prefix_off():
    assert below({"a.b": 1, "a.c.d": 2, "ab": 3}, "a.") == {"b": 1, "c.d": 2}

"""A run with the Fisher information: measured once, kept with the progress, and used."""

import json

import chex
import jax
import numpy as np
import pytest

import fpq_jax._pipeline.fisher_pass as fisher_pass
from fpq_jax import FpqError, QTensor, Recipe
from fpq_jax._pipeline.job import JobOptions, open_job
from fpq_jax._pipeline.run import publish, run_progress, run_recipe

RECIPE = {"weight": {"constraint": "m2", "group_size": 16}, "order": "activation"}


def run(job, recipe, output):
    with run_progress(job, recipe, output) as progress:
        found = run_recipe(job, recipe, progress, began=0.0, rows=False)
        publish(job, found.report, progress, output, None)
    return found


def params(output):
    from fpq_jax import load
    from fpq_jax.models.parameters import params_of

    return params_of(load(output))


@pytest.mark.full
def test_it_is_measured_once_and_a_run_that_was_stopped_goes_on_with_it(tiny_llama, text_file, tmp_path, monkeypatch):
    rule = {"match": "*.layers.0.mlp.down_proj", "fisher": 0.0}
    recipe = Recipe.from_dict(RECIPE | {"fisher": 0.5, "rules": [rule]})
    options = JobOptions(model=str(tiny_llama), calibration=str(text_file), num_samples=6, max_windows=2)
    job = open_job(options, [recipe])
    run(job, recipe, tmp_path / "whole")

    measured = []
    behind = fisher_pass.layers_behind
    monkeypatch.setattr(fisher_pass, "layers_behind", lambda *a, **b: (measured.append(a), behind(*a, **b))[1])

    class StoppedError(Exception):
        pass

    def stop(*_, **__):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("fpq_jax._pipeline.run.quantize_parts", stop)
        with pytest.raises(StoppedError):
            run(job, recipe, tmp_path / "stopped")
    ((_, _, kernels, batches, _),) = measured
    assert [len(layer) for layer in kernels] == [6, 7] and batches.count == 6
    run(job, recipe, tmp_path / "stopped")
    assert len(measured) == 1
    chex.assert_trees_all_equal(*(jax.device_get(params(tmp_path / name)) for name in ("whole", "stopped")))
    assert not (tmp_path / "stopped.unfinished").exists()
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["recipe"]["fisher"] == 0.5

    # what was kept is measured again where its files are not what they were
    with monkeypatch.context() as patch:
        patch.setattr("fpq_jax._pipeline.run.quantize_parts", stop)
        with pytest.raises(StoppedError):
            run(job, recipe, tmp_path / "damaged")
    assert not (tmp_path / "damaged.unfinished" / "backward").exists()
    (tmp_path / "damaged.unfinished" / "fisher" / "1.npz").write_bytes(b"nothing")
    run(job, recipe, tmp_path / "damaged")
    assert len(measured) == 3

    plain = Recipe.from_dict(RECIPE | {"rules": [rule]})
    run(job, plain, tmp_path / "plain")
    assert len(measured) == 3
    changed = {
        path: np.any(np.asarray(leaf.codes) != np.asarray(params(tmp_path / "plain")[path].codes))
        for path, leaf in params(tmp_path / "whole").items()
        if isinstance(leaf, QTensor)
    }
    assert not changed["layers.0.mlp.down_proj.kernel"] and sum(changed.values()) == 13


def test_bits_are_divided_as_the_losses_say(tiny_llama, text_file, tmp_path):
    rule = {"match": "*.layers.0.mlp.down_proj", "quantize": False}
    fixed = {"match": "*.layers.1.mlp.down_proj", "weight": {"format": "int4"}}
    recipe = Recipe.from_dict(RECIPE | {"bits": 6.5, "rules": [rule, fixed]})
    options = JobOptions(model=str(tiny_llama), calibration=str(text_file), num_samples=6, max_windows=2)
    job = open_job(options, [recipe])
    found = run(job, recipe, tmp_path / "out")
    kinds = {
        path: str(leaf.spec.format) for path, leaf in params(tmp_path / "out").items() if isinstance(leaf, QTensor)
    }
    assert kinds.pop("layers.1.mlp.down_proj.kernel") == "int4" and set(kinds.values()) == {"e2m1", "e4m3"}
    assert len(kinds) == 12 and 5.5 < found.report["bits_per_weight"] <= 6.5
    written = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert written.bits is None and len(written.rules) == 2 + sum(kind == "e4m3" for kind in kinds.values())
    # the recipe that was chosen gives the same model
    run(open_job(options, [written]), written, tmp_path / "again")
    chex.assert_trees_all_equal(*(jax.device_get(params(tmp_path / name)) for name in ("out", "again")))


def test_bits_that_no_choice_can_reach_are_refused_at_once(tiny_llama, text_file):
    options = JobOptions(model=str(tiny_llama), calibration=str(text_file))
    with pytest.raises(
        FpqError, match=r"bits is 4, and the least that this recipe can take of this model is 5.1111; say --bits"
    ):
        open_job(options, [Recipe.from_dict(RECIPE | {"bits": 4})])
    with pytest.raises(FpqError, match="nothing to choose"):
        open_job(
            options, [Recipe.from_dict(RECIPE | {"bits": 6, "rules": [{"match": "*", "weight": {"format": "e3m0"}}]})]
        )

"""A run with the Fisher information: measured once, kept with the progress, and used."""

import json

import chex
import jax
import numpy as np
import pytest

import fpq_jax._pipeline.fisher_pass as fisher_pass
from fpq_jax import QTensor, Recipe
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


def test_it_is_measured_once_and_a_run_that_was_stopped_goes_on_with_it(tiny_llama, text_file, tmp_path, monkeypatch):
    rule = {"match": "*.layers.0.mlp.down_proj", "fisher": 0.0}
    recipe = Recipe.from_dict(RECIPE | {"fisher": 0.5, "rules": [rule]})
    options = JobOptions(model=str(tiny_llama), calibration=str(text_file), num_samples=6, max_windows=2)
    job = open_job(options, [recipe])
    run(job, recipe, tmp_path / "whole")

    measured = []
    layer_fishers = fisher_pass.layer_fishers
    monkeypatch.setattr(fisher_pass, "layer_fishers", lambda *a, **b: (measured.append(a), layer_fishers(*a, **b))[1])

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

"""Every optimizer gives the same result at every shape, and goes on from a checkpoint at another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dist_ft.checkpoint.consolidate import consolidate
from dist_ft.config import Config
from dist_ft.coordinator.start import check_resume
from dist_ft.errors import UsageError
from dist_ft.jobs.export import probe_slices
from dist_ft.model.base import load_model
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import Attempt, Floats, differing, prepare, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

NUM_STEPS = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion": {"optimizer__kind": "lion", "optimizer__lr": 3e-4, "optimizer__weight_decay": 0.1},
    "schedule_free_adamw": {
        "optimizer__kind": "schedule_free_adamw", "optimizer__lr": 3e-3, "optimizer__weight_decay": 0.1,
        "schedule__kind": "constant_with_warmup", "optimizer__eps": 1e-4,
    },
}  # fmt: skip
METHODS = ("full", "lora")
SHAPES = [((3, 3), (0, 2)), ((2, 2), (1, 3)), ((0, 3), (2, 1)), ((1, 2), (3, 2))]
"""(stage, workers) of a run, and of its resume."""
CASES = [
    # One of each in `make test`; the others are rows of `make exactness`.
    pytest.param(optimizer, method, *shape, marks=[] if index == number else pytest.mark.exactness)
    for number, (optimizer, method) in enumerate(product(OPTIMIZERS, METHODS))
    for index, shape in enumerate(SHAPES)
]


def make_config(data: Path, optimizer: str, method: str, name: str, stage: int, size: int) -> Config:
    return tiny_config(
        data,
        run__name=name,
        method__kind=method,
        method__lora_dropout=0.1,
        zero__stage=stage,
        cluster__num_workers=size,
        train__max_steps=NUM_STEPS,
        checkpoint__every_steps=2,
        eval__every_steps=2,
        **OPTIMIZERS[optimizer],
    )


@dataclass
class Reference:
    """One worker at stage 0."""

    data: Path
    prepared: dict[str, Any]
    run: Attempt


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> Callable[[str, str], Reference]:
    found: dict[tuple[str, str], Reference] = {}

    def get(optimizer: str, method: str) -> Reference:
        if (optimizer, method) not in found:
            data = tmp_path_factory.mktemp(f"{optimizer}-{method}")
            config = make_config(data, optimizer, method, "reference", 0, 1)
            prepared = prepare(ranks, config)
            found[optimizer, method] = Reference(data, prepared, train(ranks, config, prepared=prepared))
        return found[optimizer, method]

    return get


@pytest.mark.parametrize(("optimizer", "method", "shape", "other"), CASES, ids=str)
def test_an_optimizer_is_the_same_at_every_shape_and_after_a_resume(
    optimizer: str,
    method: str,
    shape: tuple[int, int],
    other: tuple[int, int],
    reference: Callable[[str, str], Reference],
    ranks: RankServer,
) -> None:
    found = reference(optimizer, method)
    name = f"{shape[0]}-{shape[1]}"
    config = make_config(found.data, optimizer, method, name, *shape)
    run = train(ranks, config, prepared=found.prepared)
    check(run, found.run)
    config = make_config(found.data, optimizer, method, name, *other)
    resumed = train(ranks, config, prepared=found.prepared, start=run.manifests[2])
    assert list(resumed.losses) == [3, 4]
    check(resumed, found.run)
    again = train(
        ranks, make_config(found.data, optimizer, method, name, *shape), prepared=found.prepared, start=run.manifests[2]
    )
    assert differing(again.state(), run.state()) == []
    assert again.losses == {step: run.losses[step] for step in (3, 4)}


def check(run: Attempt, wanted: Attempt) -> None:
    steps = list(run.losses)
    assert run.outcome == "completed"
    assert run.digests == {step: wanted.digests[step] for step in steps}
    assert run.losses == pytest.approx({step: wanted.losses[step] for step in steps}, rel=1e-5)
    measured = {row["step"]: row["eval_loss"] for row in run.evals}
    assert measured == pytest.approx({row["step"]: row["eval_loss"] for row in wanted.evals if row["step"] in measured})
    assert run.manifests[4].optimizer_numbers == wanted.manifests[4].optimizer_numbers
    assert run.manifests[4].optimizer_step == NUM_STEPS
    found, expected = run.state(), wanted.state()
    assert found.keys() == expected.keys()
    for kind in {kind for _, kind in expected}:
        mine, theirs = (np.concatenate([s[key] for key in sorted(s) if key[1] == kind]) for s in (found, expected))
        # Lion moves an element by the rate, whatever its gradient: where rounding decides a sign, by twice the rate.
        is_close = np.isclose(mine, theirs, rtol=1e-4, atol=1e-6)
        assert is_close.mean() >= 0.999, kind
        assert np.linalg.norm(mine - theirs) <= 1e-3 * np.linalg.norm(theirs), kind


def exported(run: Attempt, to: Path) -> dict[str, Floats]:
    store = LocalStore(run.run_dir)
    consolidate(store, run.manifests[NUM_STEPS], to, stem="model", dtype="float32")
    return load_file(to / "model.safetensors")


def test_schedule_free_measures_and_exports_the_average(
    reference: Callable[[str, str], Reference], tmp_path: Path
) -> None:
    found = reference("schedule_free_adamw", "full")
    run = found.run
    state, weights = run.state(), exported(run, tmp_path / "export")
    for param in run.manifests[NUM_STEPS].params:
        y, z = state[param.name, "fp32"], state[param.name, "z"]
        x = (y.astype(np.float64) - 0.1 * z) / 0.9
        np.testing.assert_allclose(weights[param.export_name].ravel(), x, rtol=1e-5, atol=1e-7)
    assert (
        max(np.abs(weights[p.export_name].ravel() - state[p.name, "fp32"]).max() for p in run.manifests[4].params)
        > 1e-5
    )
    probe = run.manifests[NUM_STEPS].probe
    assert probe is not None
    config = make_config(found.data, "schedule_free_adamw", "full", "reference", 0, 1)
    of_slices = probe_slices(config, LocalStore(run.run_dir), run.manifests[NUM_STEPS])
    np.testing.assert_allclose(of_slices.logits, probe.logits, rtol=1e-4, atol=1e-4)
    model = load_model(make_config(tmp_path, "lion", "full", "plain", 0, 1))
    for values, expected in ((weights, True), (run.weights(), False)):
        tensors = {
            p.export_name: torch.from_numpy(values[p.export_name if expected else p.name].copy()).view(p.shape)
            for p in run.manifests[4].params
        }
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([probe.tokens])).logits[0][:, list(probe.columns)]
        assert torch.allclose(logits, torch.tensor(probe.logits), rtol=1e-4, atol=1e-4) is expected


def test_a_resume_with_another_optimizer_names_both(reference: Callable[[str, str], Reference]) -> None:
    manifest = reference("lion", "full").run.manifests[NUM_STEPS]
    with pytest.raises(UsageError, match="optimizer: checkpoint lion, config adamw"):
        check_resume(manifest, replace(manifest.fingerprint, optimizer="adamw"))

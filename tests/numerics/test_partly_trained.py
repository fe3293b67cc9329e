"""Frozen parameters, and modules trained whole beside an adapter: the same at every shape and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config
from tests.helpers.attempts import Attempt, prepare, relative_l2, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

CHANGES: dict[str, dict[str, Any]] = {
    "freeze": {"method__kind": "full", "method__freeze": ["embed", r"layers\.0\."]},
    "modules_to_save": {
        "method__kind": "lora", "method__lora_dropout": 0.1, "method__modules_to_save": ["lm_head"],
    },
    "dora": {
        "method__kind": "lora", "method__lora_dropout": 0.1, "method__modules_to_save": ["lm_head"],
        "method__use_dora": True, "method__use_rslora": True, "method__target_modules": ["q_proj", "down_proj"],
        "method__layers_to_transform": [1],
    },
}  # fmt: skip


def make_config(data: Path, what: str, name: str, stage: int, size: int) -> Config:
    return tiny_config(
        data,
        run__name=name,
        **CHANGES[what],
        data__eval=None,
        zero__stage=stage,
        cluster__num_workers=size,
        train__max_steps=4,
        checkpoint__every_steps=2,
        # Adam's first step is g / (|g| + eps): with a small eps, rounding noise moves an element whose gradient is next
        # to nothing by as much as any other. With 1e-6 a single one of lora_B's 128 moved by 8e-6, at any stage, and
        # its tensor by 1e-4. With 1e-4 no element can move so far.
        optimizer__eps=1e-4,
    )


@dataclass
class Reference:
    """One worker at stage 0."""

    data: Path
    prepared: dict[str, Any]
    run: Attempt


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> Callable[[str], Reference]:
    found: dict[str, Reference] = {}

    def get(what: str) -> Reference:
        if what not in found:
            data = tmp_path_factory.mktemp(what)
            config = make_config(data, what, "reference", 0, 1)
            prepared = prepare(ranks, config)
            found[what] = Reference(data, prepared, train(ranks, config, prepared=prepared, body="train_and_look"))
        return found[what]

    return get


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(
    ("shape", "other"), [((0, 2), (3, 1)), ((2, 3), (0, 2)), ((3, 2), (2, 3)), ((3, 3), (1, 2))], ids=str
)
def test_a_partly_trained_model_is_the_same_at_every_shape_and_after_a_resume(
    what: str,
    shape: tuple[int, int],
    other: tuple[int, int],
    reference: Callable[[str], Reference],
    ranks: RankServer,
) -> None:
    found = reference(what)
    name = f"{shape[0]}-{shape[1]}"
    config = make_config(found.data, what, name, *shape)
    run = train(ranks, config, prepared=found.prepared, body="train_and_look")
    check(run, found.run)
    config = make_config(found.data, what, name, *other)
    resumed = train(ranks, config, prepared=found.prepared, body="train_and_look", start=run.manifests[2])
    assert list(resumed.losses) == [3, 4]
    check(resumed, found.run)


def check(run: Attempt, wanted: Attempt) -> None:
    steps = list(run.losses)
    assert run.outcome == "completed"
    assert run.digests == {step: wanted.digests[step] for step in steps}
    assert run.losses == pytest.approx({step: wanted.losses[step] for step in steps}, rel=1e-5)
    assert relative_l2(run.weights(), wanted.weights()) < 1e-5
    for result in run.results:
        assert result["changed"] == []
        assert result["frozen"] == wanted.results[0]["frozen"]


def test_what_is_frozen_and_what_is_trained(reference: Callable[[str], Reference]) -> None:
    run = reference("freeze").run
    frozen = run.results[0]["frozen"]
    trained = {param.name for param in run.manifests[4].params}
    assert "model.embed_tokens.weight" in frozen
    assert sum("layers.0." in name for name in frozen) == 9 == len(frozen) - 1
    assert trained.isdisjoint(frozen)
    assert {"lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= trained
    run = reference("modules_to_save").run
    whole = [param for param in run.manifests[4].params if "lora_" not in param.name]
    assert [param.name for param in whole] == ["base_model.model.lm_head.modules_to_save.default.weight"]
    assert "base_model.model.lm_head.original_module.weight" in run.results[0]["frozen"]

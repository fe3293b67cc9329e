"""The result does not depend on ZeRO stage, world size or micro batch; a resume is bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dist_ft.checkpoint.consolidate import consolidate
from dist_ft.checkpoint.lineage import committed
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import tiny_config
from tests.helpers.group import Group, run_group, stop_early
from tests.helpers.rows import last_rows


def final_weights(group: Group, tmp_path: Path) -> dict:
    manifest = committed(LocalStore(group.run_dir.path))[-1]
    out = tmp_path / f"w-{group.run_dir.path.name}-{manifest.step}-{manifest.attempt}"
    consolidate(LocalStore(group.run_dir.path), manifest, out, stem="model", dtype="float32")
    return load_file(out / "model.safetensors")


def relative_l2(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float(((a[k] - b[k]) ** 2).sum() ** 0.5 / max((b[k] ** 2).sum() ** 0.5, 1e-12)) for k in a)


# Adam's first step is g / (|g| + eps). With 1e-8 it moves an element whose gradient is rounding noise as far as any
# other: single elements of lora_B, by which their tensor differs by 1.5e-5 after six steps.
EPS = 1e-4


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, starter: str) -> dict:
    """One worker at stage 0, for each method: what every other shape must equal."""
    found = {}
    for kind in ("full", "lora"):
        tmp_path = tmp_path_factory.mktemp(f"reference-{kind}")
        config = tiny_config(
            tmp_path, method__kind=kind, method__lora_dropout=0.1, zero__stage=0, cluster__num_workers=1,
            optimizer__eps=EPS,
        )  # fmt: skip
        group = run_group(config, starter)
        assert group.outcome == "completed"
        found[kind] = (group, final_weights(group, tmp_path))
    return found


@pytest.mark.parametrize(
    ("kind", "stage", "world_size", "micro"),
    [
        ("full", 0, 2, 2), ("full", 1, 2, 1), ("full", 2, 3, 1), ("full", 3, 2, 2), ("full", 3, 1, 3),
        ("lora", 0, 3, 1), ("lora", 1, 1, 8), ("lora", 2, 2, 3), ("lora", 3, 3, 2),
    ],
)  # fmt: skip
def test_every_shape_gives_the_result_of_one_worker_at_stage_0(
    kind: str, stage: int, world_size: int, micro: int, references: dict, tmp_path: Path, starter: str
) -> None:
    reference, weights = references[kind]
    config = tiny_config(
        tmp_path,
        method__kind=kind,
        method__lora_dropout=0.1,
        zero__stage=stage,
        cluster__num_workers=world_size,
        train__micro_batch_size=micro,
        optimizer__eps=EPS,
    )
    group = run_group(config, starter)
    assert group.outcome == "completed"
    assert group.digests == reference.digests
    assert group.losses == pytest.approx(reference.losses, rel=1e-5)
    assert relative_l2(final_weights(group, tmp_path), weights) < 1e-5
    first, wanted = _first_norm(group), _first_norm(reference)
    assert first == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype", "stage"),
    [
        ("full", "float32", 2),
        ("lora", "float32", 3),
        ("full", "bfloat16", 1),
        ("lora", "bfloat16", 2),
        ("full", "float32", 0),
    ],
)
def test_stop_and_resume_at_the_same_shape_is_bitwise(
    kind: str, dtype: str, stage: int, tmp_path: Path, starter: str
) -> None:
    changes = {"method__kind": kind, "model__dtype": dtype, "zero__stage": stage}
    whole = run_group(tiny_config(tmp_path, run__name="whole", **changes), starter)

    config = tiny_config(tmp_path, run__name="parts", **changes)
    stopped = run_group(config, starter, on_message=stop_early)
    assert stopped.outcome == "stopped"
    assert 1 <= committed(LocalStore(stopped.run_dir.path))[-1].step < 6
    resumed = run_group(config, starter)
    assert resumed.outcome == "completed"
    assert resumed.losses == whole.losses
    assert resumed.digests == whole.digests
    one, two = final_weights(whole, tmp_path), final_weights(resumed, tmp_path)
    assert all((one[name] == two[name]).all() for name in one)


def test_bf16_with_fp32_accumulation_agrees_between_shapes(tmp_path: Path, starter: str) -> None:
    one = run_group(tiny_config(tmp_path, run__name="one", model__dtype="bf16", cluster__num_workers=1), starter)
    three = run_group(
        tiny_config(tmp_path, run__name="three", model__dtype="bf16", cluster__num_workers=3, zero__stage=3),
        starter,
    )
    assert three.losses == pytest.approx(one.losses, rel=5e-3)


def test_packed_and_unpacked_runs_consume_the_same_tokens(tmp_path: Path, starter: str) -> None:
    changes = {"train__epochs": 1.0, "train__max_steps": None, "data__packing": True}
    group = run_group(tiny_config(tmp_path, **changes), starter)
    assert group.outcome == "completed"
    plain = run_group(tiny_config(tmp_path, run__name="plain", **{**changes, "data__packing": False}), starter)
    totals = [sum(row["trained_tokens"] for row in _rows(g)) for g in (group, plain)]
    assert totals[0] == totals[1] > 0
    assert len(_rows(group)) < len(_rows(plain))


def _rows(group: Group) -> list[dict]:
    return list(last_rows(group.run_dir.metrics).values())


def _first_norm(group: Group) -> float:
    return _rows(group)[0]["grad_norm"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(kind: str, references: dict, tmp_path: Path, starter: str) -> None:
    reference, weights = references[kind]
    config = tiny_config(
        tmp_path,
        method__kind=kind,
        method__lora_dropout=0.1,
        zero__stage=3,
        train__gradient_checkpointing=True,
        optimizer__eps=EPS,
    )
    group = run_group(config, starter)
    assert group.outcome == "completed"
    assert group.losses == pytest.approx(reference.losses, rel=1e-5)
    assert relative_l2(final_weights(group, tmp_path), weights) < 1e-5


def test_a_step_that_is_not_finite_ends_the_attempt_and_is_not_saved(tmp_path: Path, starter: str) -> None:
    config = tiny_config(
        tmp_path, optimizer__lr=1e30, optimizer__max_grad_norm=0.0, checkpoint__every_steps=1, train__max_steps=30
    )
    group = run_group(config, starter)
    assert group.outcome == "failed"
    assert {f.type for f in group.coordinator.status().failures} == {"DivergedError"}
    rows = _rows(group)
    assert committed(LocalStore(group.run_dir.path))[-1].step == len(rows) > 0

"""State goes from any shape to any other and back without losing a bit, and each byte is read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config
from tests.helpers.attempts import (
    BODIES,
    Attempt,
    State,
    attempt_spec,
    commit_copy,
    differing,
    prepare,
    read_files,
    read_state,
    run_path,
    train,
)
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

SIZES = (1, 2, 3)
STEP = 2  # where the state is taken; the undisturbed run goes one step further

# kind, dtype → where the state comes from (stage, world size).
ORIGINS = {
    ("full", "float32"): (2, 2),
    ("lora", "float32"): (3, 3),
    ("full", "bfloat16"): (1, 2),
    ("lora", "bfloat16"): (2, 3),
}
WHOLE_TABLE = [*product((0, 1, 2, 3), SIZES)]
SHAPES = {
    ("full", "float32"): WHOLE_TABLE,
    ("lora", "float32"): WHOLE_TABLE,
    ("full", "bfloat16"): WHOLE_TABLE[3:],  # stage 0 is run as stage 1
    ("lora", "bfloat16"): [(1, 2), (2, 1), (3, 3), (1, 3)],
}
CASES = [(*key, *shape) for key in ORIGINS for shape in SHAPES[key]]
GROUP = {"lr": 1e-3, "weight_decay": 0.05}
PATTERNS = {"full": "lm_head|embed", "lora": "lora_B"}


@dataclass
class Origin:
    """An undisturbed run, the state in its middle and at its end, and where other shapes wrote that state."""

    run: Attempt
    prepared: dict[str, Any]
    state: State
    groups: list[dict[str, Any]]
    optimizer_step: int
    eval_loss: float
    copies: dict[tuple[int, int], Manifest]


def make_config(tmp_path: Path, kind: str, dtype: str, stage: int, size: int) -> Config:
    return tiny_config(
        tmp_path,
        run__name="origin",
        method__kind=kind,
        method__lora_dropout=0.1,
        model__dtype=dtype,
        optimizer__groups=[{"pattern": PATTERNS[kind], **GROUP}],
        zero__stage=stage,
        cluster__num_workers=size,
        train__max_steps=STEP + 1,
        checkpoint__every_steps=1,
        checkpoint__keep_last=99,
    )


def number_of(stage: int, size: int) -> int:
    """A free attempt number for what this shape writes."""
    return 100 + 10 * stage + size


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restored")


@pytest.fixture(scope="module")
def origins(base: Path, ranks: RankServer) -> Callable[[str, str], Origin]:
    """Makes an origin on first use."""
    found: dict[tuple[str, str], Origin] = {}

    def get(kind: str, dtype: str) -> Origin:
        if (kind, dtype) not in found:
            directory = base / f"{kind}-{dtype}"
            directory.mkdir()
            config = make_config(directory, kind, dtype, *ORIGINS[kind, dtype])
            prepared = prepare(ranks, config)
            run = train(ranks, config, prepared=prepared)
            results = restored(ranks, config, prepared, run.manifests[STEP], write_as=90)
            first = results[0]
            found[kind, dtype] = Origin(
                run, prepared, run.state(STEP), first["groups"], first["optimizer_step"], first["eval_loss"], {}
            )
        return found[kind, dtype]

    return get


def restored(
    ranks: RankServer, config: Config, prepared: dict[str, Any], start: Manifest, write_as: int
) -> list[dict[str, Any]]:
    spec = attempt_spec(config, prepared, 1, start)
    return ranks.run(config.cluster.max_workers, f"{BODIES}:restore", {"attempt": spec, "write_as": write_as})


def restored_at(
    ranks: RankServer, base: Path, origin: Origin, case: tuple[str, str, int, int]
) -> tuple[Manifest, list[dict[str, Any]]]:
    """Restores the origin's state at a shape and commits what that shape writes of it."""
    kind, dtype, stage, size = case
    config = make_config(base / f"{kind}-{dtype}", kind, dtype, stage, size)
    number = number_of(stage, size)
    results = restored(ranks, config, origin.prepared, origin.run.manifests[STEP], number)
    files = [result["file"] for result in results]
    manifest = commit_copy(run_path(config), origin.run.manifests[STEP], number, config.zero_stage, files)
    origin.copies[stage, size] = manifest
    return manifest, results


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_restored_state_is_bitwise_at_every_shape(
    case: tuple[str, str, int, int], base: Path, origins: Callable[[str, str], Origin], ranks: RankServer
) -> None:
    kind, dtype, _, _ = case
    origin = origins(kind, dtype)
    manifest, results = restored_at(ranks, base, origin, case)
    # `read_state` also checks that the ranks together wrote each element exactly once.
    assert differing(read_state(origin.run.run_dir, manifest), origin.state) == []
    for result in results:
        assert result["step"] == STEP
        assert result["optimizer_step"] == origin.optimizer_step == STEP
        assert result["groups"] == origin.groups
        assert result["stale_weights"] == []
    trained = sum(param.numel for param in manifest.params)
    assert sum(result["bytes_read"] for result in results) == 12 * trained
    if dtype == "float32":
        assert {result["eval_loss"] for result in results} == {results[0]["eval_loss"]}
        assert results[0]["eval_loss"] == pytest.approx(origin.eval_loss, rel=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), ORIGINS)
def test_optimizer_groups_are_what_the_config_says(
    kind: str, dtype: str, origins: Callable[[str, str], Origin]
) -> None:
    found = {(group["initial_lr"], group["weight_decay"]) for group in origins(kind, dtype).groups}
    own = (GROUP["lr"], GROUP["weight_decay"])
    assert found == ({own, (3e-3, 0.1), (3e-3, 0.0)} if kind == "full" else {own, (3e-3, 0.1)})
    assert {(*group["betas"], group["eps"]) for group in origins(kind, dtype).groups} == {(0.9, 0.999, 1e-8)}


@pytest.mark.parametrize(("kind", "dtype"), ORIGINS)
def test_there_and_back_is_the_identity_and_the_next_step_is_bitwise(
    kind: str, dtype: str, base: Path, origins: Callable[[str, str], Origin], ranks: RankServer
) -> None:
    origin = origins(kind, dtype)
    cases = [case for case in CASES if case[:2] == (kind, dtype)]
    for case in cases:
        if case[2:] not in origin.copies:  # this test alone was asked for
            restored_at(ranks, base, origin, case)
    config = make_config(base / f"{kind}-{dtype}", kind, dtype, *ORIGINS[kind, dtype])
    copies = [origin.copies[case[2:]] for case in cases]
    arguments = {
        "attempt": attempt_spec(config, origin.prepared, 1, None),
        "checkpoints": [f"{manifest.directory}/{MANIFEST}" for manifest in copies],
        "write_as": 200,
    }
    by_rank = ranks.run(config.cluster.max_workers, f"{BODIES}:go_on_from_each", arguments)
    params = origin.run.manifests[STEP].params
    wanted_row = origin.run.rows[STEP]
    for index, case in enumerate(cases):
        results = [trips[index] for trips in by_rank]
        at = run_path(config) / "checkpoints"
        back = [at / f"step-{STEP:08d}-a{200 + 2 * index:04d}" / result["file"]["name"] for result in results]
        assert differing(read_files(back, params), origin.state) == [], case
        after = [
            at / f"step-{STEP + 1:08d}-a{201 + 2 * index:04d}" / result["staged"][0]["file"]["name"]
            for result in results
        ]
        assert differing(read_files(after, params), origin.run.state(STEP + 1)) == [], case
        row = results[0]["rows"][0]
        for key in ("step", "loss", "grad_norm", "digest", "lr"):
            assert row[key] == wanted_row[key], (case, key)

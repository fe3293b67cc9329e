"""Held-out numbers are the same at any number of workers, and so is what a run decides by them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config
from dist_ft.config.training_sections import EarlyStopping, EvalConfig
from dist_ft.run.log import read_evals
from dist_ft.run.scores import Scores, perplexity
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import Attempt, prepare, train
from tests.helpers.configs import tiny_config
from tests.helpers.group import run_group
from tests.helpers.ranks import RankServer
from tests.helpers.rows import last_rows, read_rows

SHAPES = [(0, 1), (2, 2), (3, 3)]
"""Stage and workers. Three workers have 4 batches of 2 rows in two rounds, of which the last two are padding."""


def _config(data: Path, name: str, stage: int, size: int, evaluation: EvalConfig, **changes: Any) -> Config:
    config = tiny_config(data, run__name=name, zero__stage=stage, cluster__num_workers=size, **changes)
    return config.model_copy(update={"eval": evaluation})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> list[Attempt]:
    data = tmp_path_factory.mktemp("measured")
    evaluation = EvalConfig(every_steps=2)
    return [
        train(ranks, _config(data, f"w{size}", stage, size, evaluation, train__max_steps=4)) for stage, size in SHAPES
    ]


def test_untrained_weights_give_the_same_bits_at_any_number_of_workers(measured: list[Attempt]) -> None:
    first = measured[0].evals[0]
    assert set(first) == {"step", "attempt", "eval_loss", "token_accuracy", "perplexity"}
    assert [attempt.evals[0] for attempt in measured] == [first] * len(SHAPES)
    assert first["perplexity"] == perplexity(first["eval_loss"])


def test_trained_weights_give_equal_numbers(measured: list[Attempt]) -> None:
    for attempt in measured:
        assert [row["step"] for row in attempt.evals] == [0, 2, 4]
        for row, wanted in zip(attempt.evals, measured[0].evals, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
    # What was learnt shows: no number that never moves.
    assert measured[0].evals[-1]["token_accuracy"] > measured[0].evals[0]["token_accuracy"]


def test_named_sets_are_measured_each_and_together_at_any_number_of_workers(
    tmp_path: Path, ranks: RankServer, measured: list[Attempt]
) -> None:
    tiny_config(tmp_path)  # writes the rows
    held_out = str(tmp_path / "eval.jsonl")
    sources = {"all": {"source": held_out}, "few": {"source": held_out, "rows": [1, 4]}}
    best = EvalConfig(every_steps=2, best_metric="few/eval_loss")
    runs = [
        train(
            ranks,
            _config(tmp_path, f"s{size}", stage, size, best, train__max_steps=4, data__eval={"sources": sources}),
        )
        for stage, size in SHAPES
    ]
    for run, alone in zip(runs, measured, strict=True):
        assert run.evals[0] == runs[0].evals[0]
        assert run.losses == alone.losses
        for row, wanted in zip(run.evals, alone.evals, strict=True):
            # The set that is the whole file gives the bits that it gives alone.
            of_all = {key.removeprefix("all/"): value for key, value in row.items() if key.startswith("all/")}
            assert of_all == {key: wanted[key] for key in ("eval_loss", "token_accuracy", "perplexity")}
            low, high = sorted((row["all/eval_loss"], row["few/eval_loss"]))
            assert low < row["eval_loss"] < high
    undisturbed, (stage, size) = runs[1], SHAPES[1]
    config = _config(tmp_path, f"s{size}", stage, size, best, train__max_steps=4, data__eval={"sources": sources})
    again = train(ranks, config, start=undisturbed.manifests[2], evaluations=undisturbed.evals[:2])
    assert [row | {"attempt": 1} for row in again.evals] == undisturbed.evals[2:]


STOPPING = EvalConfig(every_steps=1, early_stopping=EarlyStopping(patience=2, min_delta=100.0))
"""Step 1 is the best by definition and nothing is 100 better, so the run ends after step 3."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> tuple[Path, dict[str, Any], Attempt]:
    data = tmp_path_factory.mktemp("stopped")
    config = _config(data, "early", 2, 2, STOPPING, checkpoint__every_steps=1, checkpoint__keep_last=9)
    prepared = prepare(ranks, config)
    return data, prepared, train(ranks, config, prepared=prepared)


def test_a_run_ends_when_patience_is_over_behind_a_checkpoint(stopped: tuple[Path, dict[str, Any], Attempt]) -> None:
    _, _, run = stopped
    assert run.outcome == "completed"
    assert list(run.losses) == [1, 2, 3]
    assert sorted(run.manifests) == [1, 2, 3]
    assert all(staged["is_last"] == (staged["step"] == 3) for staged in run.results[0]["staged"])


@pytest.mark.parametrize(("killed_after", "shape"), [(1, (3, 3)), (2, (2, 2)), (2, (0, 1)), (3, (2, 2))], ids=str)
def test_a_run_killed_on_the_way_ends_at_the_same_step(
    killed_after: int,
    shape: tuple[int, int],
    stopped: tuple[Path, dict[str, Any], Attempt],
    ranks: RankServer,
) -> None:
    data, prepared, run = stopped
    config = _config(data, "early", *shape, STOPPING, checkpoint__every_steps=1, checkpoint__keep_last=9)
    before = [row for row in run.evals if row["step"] <= killed_after]
    again = train(ranks, config, prepared=prepared, start=run.manifests[killed_after], evaluations=before)
    assert again.outcome == "completed"
    assert list(again.losses) == list(range(killed_after + 1, 4))


def test_the_history_reaches_the_next_attempt_through_the_run_directory(tmp_path: Path, starter: str) -> None:
    config = _config(tmp_path, "files", 2, 2, STOPPING, checkpoint__every_steps=1, checkpoint__keep_last=9)
    first = run_group(config, starter)
    assert first.outcome == "completed", first.errors
    run_dir = first.run_dir
    for manifest in committed(LocalStore(run_dir.path)):
        if manifest.step > 2:  # as if the group had been killed after it had measured step 3
            shutil.rmtree(run_dir.path / manifest.directory)
    assert run_group(config, starter).outcome == "completed"
    assert sorted(last_rows(run_dir.metrics)) == [1, 2, 3]
    assert [m.step for m in committed(LocalStore(run_dir.path))] == [1, 2, 3]
    stops = [row for row in read_rows(run_dir.ledger) if row["event"] == "early_stop"]
    assert [(row["step"], row["metric"], row["patience"], row["attempt"]) for row in stops] == [
        (3, "eval_loss", 2, 1),
        (3, "eval_loss", 2, 2),
    ]


def test_the_best_checkpoint_is_made_and_kept(tmp_path: Path, starter: str) -> None:
    evaluation = EvalConfig(every_steps=1, best_metric="eval_loss")
    changes = {"checkpoint__every_steps": 2, "checkpoint__keep_last": 1, "optimizer__lr": 0.3}  # gets worse
    config = _config(tmp_path, "best", 2, 2, evaluation, **changes)
    group = run_group(config, starter)
    assert group.outcome == "completed", group.errors
    best = Scores.of(read_evals(group.run_dir.evals).values(), "eval_loss", 1, 6).best()
    assert best == 1, "the test needs a run that gets worse"
    assert [manifest.step for manifest in committed(LocalStore(group.run_dir.path))] == [1, 6]

"""Finished models are measured as models in training are, by any number of tasks, in any company."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config
from dist_ft.config.training_sections import EvalConfig
from dist_ft.evaluate.merge import AnsweredRow, EvalShare, Evaluation, merge
from dist_ft.jobs.spec import evaluate_tasks, export_task
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import tiny_config, write_rows
from tests.helpers.group import run_group
from tests.helpers.rows import last_rows

NUM_ROWS = 70  # three batches
STEPS = {"best": 3, "tuned": 6}


@dataclass
class Exported:
    """A run with an export of two of its steps."""

    config: Config
    models: dict[str, str | None]
    evals: dict[int, dict[str, Any]]

    def measure(
        self, starter: str, num_tasks: int, models: dict[str, str | None] | None = None
    ) -> tuple[Evaluation, list[AnsweredRow]]:
        """Returns what the tasks found, put together, and all answers."""
        models = models or self.models
        tasks = evaluate_tasks(self.config, models, num_tasks, num_nodes=1)
        assert len(tasks) == num_tasks
        shares = [EvalShare.from_dict(run_task(starter, task.name, task.arguments)) for task in tasks]
        answered = sorted((row for share in shares for row in share.rows), key=lambda row: row.row)
        return merge(self.config.eval, models, shares), answered


@pytest.fixture(scope="module", params=["lora", "full"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starter: str) -> Exported:
    data = tmp_path_factory.mktemp(request.param)
    write_rows(data / "train.jsonl", 41)
    write_rows(data / "eval.jsonl", NUM_ROWS, first=1000)
    changes = {"method__kind": request.param, "optimizer__lr": {"lora": 0.5, "full": 0.03}[request.param]}
    config = tiny_config(data, **changes, checkpoint__every_steps=3, checkpoint__keep_last=9)
    evaluation = EvalConfig(every_steps=3, metrics=["exact_match", "rouge_l", "bleu"], max_new_tokens=8)
    config = config.model_copy(update={"eval": evaluation})
    group = run_group(config, starter)
    assert group.outcome == "completed", group.errors
    for manifest in committed(LocalStore(group.run_dir.path)):
        task = export_task(config, group.run_dir, manifest)
        run_task(starter, task.name, task.arguments)
    models: dict[str, str | None] = {"base": None}
    models |= {name: str(group.run_dir.export(step)) for name, step in STEPS.items()}
    return Exported(config, models, last_rows(group.run_dir.evals))


def test_any_number_of_tasks_gives_the_same_answers(exported: Exported, starter: str) -> None:
    one, two, three = (exported.measure(starter, count) for count in (1, 2, 3))
    (evaluation, answered) = one
    assert evaluation.num_rows == NUM_ROWS
    assert [row.row for row in answered] == list(range(NUM_ROWS))
    assert answered == two[1] == three[1]
    assert list(evaluation.models) == list(exported.models)
    assert evaluation.models == two[0].models == three[0].models
    # Each model says something of its own, so that a mix-up would show.
    said = {name: [row.answers[name] for row in answered] for name in exported.models}
    assert said["base"] != said["best"] != said["tuned"] != said["base"]


def test_a_model_says_the_same_whichever_was_measured_before_it(exported: Exported, starter: str) -> None:
    _, together = exported.measure(starter, 1)
    for name in exported.models:
        _, alone = exported.measure(starter, 1, {name: exported.models[name]})
        assert [row.answers[name] for row in alone] == [row.answers[name] for row in together]


def test_held_out_numbers_are_those_of_the_training(exported: Exported, starter: str) -> None:
    arguments = {"config": exported.config.model_dump(mode="json"), "models": exported.models, "with_loss": True}
    found = run_task(starter, "evaluate", arguments)["numbers"]
    for name, step in {"base": 0, **STEPS}.items():
        wanted = {key: exported.evals[step][key] for key in ("eval_loss", "token_accuracy", "perplexity")}
        assert found[name] == pytest.approx(wanted, rel=1e-5)


def test_more_tasks_than_batches_leave_some_without_work(exported: Exported, starter: str) -> None:
    tasks = evaluate_tasks(exported.config, exported.models, 5, num_nodes=1)
    idle = run_task(starter, tasks[4].name, tasks[4].arguments)
    assert idle["rows"] == []
    assert idle["numbers"] == {}

"""What follows the last step: exports of the last checkpoint and the best, their measurement, the run's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.evaluate.merge import EvalShare, merge
from dist_ft.jobs.spec import TaskSpec, evaluate_tasks, export_task
from dist_ft.layout import read_json, write_whole
from dist_ft.metric_rows import EvalRow
from dist_ft.orchestrate.driver.coordination import CoordinatorHandle
from dist_ft.report.console import Console
from dist_ft.run.events import EarlyStop, Exported, read_ledger
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.place import Run
from dist_ft.run.scores import Scores

RunTasks = Callable[[Sequence[TaskSpec]], list[dict[str, Any]]]

_SAMPLES_SHOWN = 3


def export_and_measure(
    config: Config,
    run_dir: Run,
    coordinator: CoordinatorHandle,
    run_tasks: RunTasks,
    num_nodes: int,
    console: Console,
) -> dict[str, Any]:
    """Exports the last checkpoint and the best one, and measures both; returns the result."""
    manifests = committed(run_dir.store)
    steps = {"tuned": manifests[-1].step}
    best = _best(config, run_dir, manifests)
    if best is not None and best != manifests[-1].step:
        steps["best"] = best
    for manifest in (m for m in manifests if m.step in steps.values()):
        _export(config, run_dir, manifest, coordinator, run_tasks, console)
    result = {**numbers(run_dir), "export_dir": _name(run_dir, "final", steps["tuned"])}
    if best is not None:
        result |= {"best_step": best, "best_dir": _name(run_dir, "best", best)}
    places = {name: run_dir.address_of(run_dir.export_name(step)) for name, step in steps.items()}
    models: dict[str, str | None] = {"base": None, **places}
    tasks = evaluate_tasks(config, models, int(read_json(run_dir.run_json)["world_size"]), num_nodes)
    if tasks:
        console.say(f"  measuring {', '.join(config.eval.metrics)} of {', '.join(models)}")
        evaluation = merge(config.eval, models, [EvalShare.from_dict(share) for share in run_tasks(tasks)])
        _write_samples(run_dir, steps["tuned"], evaluation.samples)
        values = replace(evaluation, samples=evaluation.samples[:_SAMPLES_SHOWN]).to_dict()
        result["evaluation"] = {**values.pop("models"), **values}
        for name, step in {"base": 0, **steps}.items():
            row = read_evals(run_dir.evals).get(step, EvalRow(step, 0, {}))
            metrics = {**row.metrics, **evaluation.models[name]}
            coordinator.call("record_evaluation", replace(row, metrics=metrics))
    result["comparison"] = _compare(run_dir, {"base": 0, **steps})
    return result


def numbers(run_dir: Run) -> dict[str, Any]:
    """Returns the numbers of a run as far as it has got."""
    last = int(read_json(run_dir.run_json)["step"])
    rows = {step: row for step, row in read_steps(run_dir.metrics).items() if step <= last}
    measured = read_evals(run_dir.evals).get(last)
    events = [entry.event for entry in read_ledger(run_dir.ledger)]
    stops = [event for event in events if isinstance(event, EarlyStop) and event.step == last]
    stopped = {name: getattr(stops[-1], name) for name in ("metric", "best_step", "patience")} if stops else None
    return {
        "final_loss": rows[last].loss if last in rows else None,
        "eval_loss": measured.eval_loss if measured else None,
        "train_s": round(sum(row.step_s for row in rows.values()), 2),
        "comparison": _compare(run_dir, {"base": 0, "tuned": last}),
        "early_stop": stopped,
    }


def _best(config: Config, run_dir: Run, manifests: Sequence[Manifest]) -> int | None:
    metric, every = config.eval.best_metric, config.eval.every_steps
    if metric is None or every is None:
        return None
    max_steps = int(read_json(run_dir.run_json)["max_steps"])
    scores = Scores.of(read_evals(run_dir.evals).values(), metric, every, max_steps)
    return scores.best(manifest.step for manifest in manifests)


def _export(
    config: Config,
    run_dir: Run,
    manifest: Manifest,
    coordinator: CoordinatorHandle,
    run_tasks: RunTasks,
    console: Console,
) -> None:
    target = run_dir.export_name(manifest.step)
    exported = Exported(manifest.step, manifest.directory)
    if run_dir.has(target) and not _was_exported(run_dir, exported):
        run_dir.store.delete(target)  # of this step, but from before a fork; or an upload that was cut off
    if not run_dir.has(target):
        console.say(f"  exporting step {manifest.step}")
        run_tasks([export_task(config, run_dir, manifest)])
        coordinator.call("add_event", exported)


def _compare(run_dir: Run, steps: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """Returns what is known of each model, by metric."""
    rows = read_evals(run_dir.evals)
    return {name: rows[step].metrics for name, step in steps.items() if step in rows}


def _write_samples(run_dir: Run, step: int, samples: Sequence[Mapping[str, str]]) -> None:
    write_whole(run_dir.samples(step), "".join(json.dumps(sample) + "\n" for sample in samples))


def _was_exported(run_dir: Run, exported: Exported) -> bool:
    events = [entry.event for entry in read_ledger(run_dir.ledger)]
    of_step = [event for event in events if isinstance(event, Exported) and event.step == exported.step]
    return of_step[-1:] == [exported]


def _name(run_dir: Run, name: str, step: int) -> str:
    """Has `exports/<name>` lead to the export of a step; returns where that is."""
    target = run_dir.export_name(step)
    run_dir.point(f"exports/{name}", target.rpartition("/")[2])
    return run_dir.address_of(target)

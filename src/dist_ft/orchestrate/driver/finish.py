"""Runs the last phase of a driver: export and measure the last and the best checkpoint, and close the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.evaluate.merge import EvalShare, merge
from dist_ft.jobs.spec import evaluate_tasks, export_task
from dist_ft.metric_rows import EvalRow
from dist_ft.orchestrate.driver.endings import Ending, Records
from dist_ft.orchestrate.driver.session import Session
from dist_ft.run.events import EarlyStop, Exported, read_ledger
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.outcome import EarlyEnd, RunNumbers, RunResult
from dist_ft.run.place import Run
from dist_ft.run.scores import Scores, chosen_warning
from dist_ft.storage.publish import read_json, write_whole

_SAMPLES_SHOWN = 3


def export_and_measure(session: Session) -> RunNumbers:
    """Export the last checkpoint and the best one, and measure both."""
    config, run_dir = session.config, session.run_dir
    manifests = committed(run_dir.store)
    steps = {"tuned": manifests[-1].step}
    record = read_json(run_dir.run_json)
    best = None
    if config.eval.best_metric is not None and config.eval.every_steps is not None:
        rows = read_evals(run_dir.evals).values()
        scores = Scores.of(rows, config.eval.best_metric, config.eval.every_steps, int(record["max_steps"]))
        best = scores.best(manifest.step for manifest in manifests)
    if best is not None and best != manifests[-1].step:
        steps["best"] = best
    for manifest in (m for m in manifests if m.step in steps.values()):
        _export(session, manifest)
    result = replace(
        read_numbers(run_dir),
        export_dir=_point(run_dir, "final", steps["tuned"]),
        best_step=best,
        best_dir=None if best is None else _point(run_dir, "best", best),
    )
    addresses = {name: run_dir.address_of(run_dir.export_name(step)) for name, step in steps.items()}
    models: dict[str, str | None] = {"base": None, **addresses}
    tasks = evaluate_tasks(config, models, int(record["world_size"]), len(session.starters.paths))
    if tasks:
        session.console.say(f"  measuring {', '.join(config.eval.metrics)} of {', '.join(models)}")
        evaluation = merge(config.eval, models, [EvalShare.from_dict(share) for share in session.run_tasks(tasks)])
        lines = [json.dumps(sample) + "\n" for sample in evaluation.samples]
        write_whole(run_dir.samples(steps["tuned"]), "".join(lines))
        shown = asdict(replace(evaluation, samples=evaluation.samples[:_SAMPLES_SHOWN]))
        result = replace(result, evaluation={**shown.pop("models"), **shown})
        for name, step in {"base": 0, **steps}.items():
            row = read_evals(run_dir.evals).get(step, EvalRow(step, 0, {}))
            session.coordinator.record_evaluation(replace(row, metrics={**row.metrics, **evaluation.models[name]}))
    comparison = _compare(run_dir, {"base": 0, **steps})
    if warning := chosen_warning(comparison.get("base", {}), comparison.get("tuned", {})):
        session.console.say(f"  {warning}", "yellow")
    return replace(result, comparison=comparison)


def read_numbers(run_dir: Run) -> RunNumbers:
    """Return the numbers of a run so far."""
    last = int(read_json(run_dir.run_json)["step"])
    rows = {step: row for step, row in read_steps(run_dir.metrics).items() if step <= last}
    measured = read_evals(run_dir.evals).get(last)
    stop: EarlyEnd | None = None
    for event in (entry.event for entry in read_ledger(run_dir.ledger)):
        if isinstance(event, EarlyStop) and event.step == last:
            stop = EarlyEnd(metric=event.metric, best_step=event.best_step, patience=event.patience)
    return RunNumbers(
        final_loss=rows[last].loss if last in rows else None,
        eval_loss=measured.eval_loss if measured else None,
        train_s=round(sum(row.step_s for row in rows.values()), 2),
        comparison=_compare(run_dir, {"base": 0, "tuned": last}),
        early_stop=stop,
    )


def close(session: Session, ending: Ending, numbers: RunNumbers) -> RunResult:
    """Close the console and the run's records, and return the result."""
    session.console.close()
    run_dir, error = session.run_dir, ending.error.to_dict() if ending.error else None
    if ending.records is Records.OURS:
        session.coordinator.finish(ending.state, numbers.to_record(), error)
        record = read_json(run_dir.run_json)
        return RunResult(
            run_dir.address, ending.state, record["step"], attempts=record["attempt"], error=error, **vars(numbers)
        )
    if ending.records is Records.ANOTHERS:
        session.coordinator.finish(ending.state, {}, None)
    return RunResult(run_dir.address, ending.state, error=error)


def _export(session: Session, manifest: Manifest) -> None:
    """Export a checkpoint, unless it was exported before."""
    run_dir = session.run_dir
    target = run_dir.export_name(manifest.step)
    exported = Exported(manifest.step, manifest.directory)
    events = [entry.event for entry in read_ledger(run_dir.ledger)]
    of_step = [event for event in events if isinstance(event, Exported) and event.step == manifest.step]
    was_exported = of_step[-1:] == [exported]
    if run_dir.has(target) and not was_exported:
        run_dir.store.delete(target)  # an export of this step from before a fork, or an upload that was cut off
    if not run_dir.has(target):
        session.console.say(f"  exporting step {manifest.step}")
        session.run_tasks([export_task(session.config, run_dir, manifest)])
        session.coordinator.add_event(exported)


def _compare(run_dir: Run, steps: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """Return the known metrics of each model."""
    rows = read_evals(run_dir.evals)
    return {name: rows[step].metrics for name, step in steps.items() if step in rows}


def _point(run_dir: Run, name: str, step: int) -> str:
    """Point `exports/<name>` at the export of a step, and return its address."""
    target = run_dir.export_name(step)
    run_dir.point(f"exports/{name}", target.rpartition("/")[2])
    return run_dir.address_of(target)

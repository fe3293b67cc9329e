"""Runs the last phase of a driver: export and measure the last and the best checkpoint, and close the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

from dist_ft.checkpoint.lineage import committed
from dist_ft.evaluate.merge import EvalShare, merge
from dist_ft.jobs.spec import evaluate_tasks
from dist_ft.metric_rows import EvalRow
from dist_ft.monitor.sink import Answers
from dist_ft.orchestrate.driver.endings import Ending, Records
from dist_ft.orchestrate.driver.export_jobs import export_now, point
from dist_ft.orchestrate.driver.session import Session
from dist_ft.run.events import EarlyStop, read_ledger
from dist_ft.run.exports import BEST, FINAL, LATEST
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
    folders = {m.step: export_now(session, m) for m in manifests if m.step in steps.values()}
    result = replace(
        read_numbers(run_dir),
        export_dir=point(run_dir, FINAL, folders[steps["tuned"]]),
        best_step=best,
        best_dir=None if best is None else point(run_dir, BEST, folders[best]),
    )
    if run_dir.pointed_at(LATEST) is not None:
        point(run_dir, LATEST, folders[steps["tuned"]])
    models: dict[str, str | None] = {"base": None}
    models |= {name: run_dir.address_of(folders[step]) for name, step in steps.items()}
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
        session.coordinator.record_answers(Answers(steps["tuned"], evaluation.samples))
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


def _compare(run_dir: Run, steps: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """Return the known metrics of each model."""
    rows = read_evals(run_dir.evals)
    return {name: rows[step].metrics for name, step in steps.items() if step in rows}

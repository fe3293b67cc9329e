"""What follows the last step: the export of the last checkpoint, its measurement, the numbers of the run."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.store import LocalStore
from dist_ft.config import Config
from dist_ft.coordinator.exports import TaskSpec, evaluate_task, export_task
from dist_ft.monitor.console import Console
from dist_ft.orchestrate.coordination import CoordinatorHandle
from dist_ft.rundir import RunDir, last_rows, read_json, read_rows


def export_and_measure(
    config: Config,
    run_dir: RunDir,
    coordinator: CoordinatorHandle,
    run_task: Callable[[TaskSpec], dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Exports the last checkpoint and measures it; returns the result."""
    manifest = committed(LocalStore(run_dir.path))[-1]
    target = run_dir.export(manifest.step)
    exported = {"step": manifest.step, "checkpoint": manifest.directory}
    if target.exists() and not _was_exported(run_dir, exported):
        shutil.rmtree(target)  # of this step, but from before a fork
    if not target.exists():
        console.say("  exporting")
        run_task(export_task(config, run_dir, manifest))
        coordinator.call("add_event", "exported", exported)
    _link(run_dir.exports / "final", target)
    result = {**numbers(run_dir), "export_dir": str(target)}
    spec = evaluate_task(config, run_dir, manifest.step)
    if spec is not None:
        console.say(f"  measuring {', '.join(config.eval.metrics)} of base and tuned model")
        evaluation = run_task(spec)
        for step, values in ((0, evaluation["base"]), (manifest.step, evaluation["tuned"])):
            row = last_rows(run_dir.evals).get(step, {"step": step, "attempt": 0})
            coordinator.call("record_evaluation", {**row, **values})
        result["evaluation"] = evaluation
    return result


def numbers(run_dir: RunDir) -> dict[str, Any]:
    """Returns the numbers of a run as far as it has got."""
    last = int(read_json(run_dir.run_json)["step"])
    rows = {step: row for step, row in last_rows(run_dir.metrics).items() if step <= last}
    evals = last_rows(run_dir.evals)
    return {
        "final_loss": rows[last]["loss"] if last in rows else None,
        "eval_loss": evals.get(last, {}).get("eval_loss"),
        "train_s": round(sum(row["step_s"] for row in rows.values()), 2),
    }


def _was_exported(run_dir: RunDir, exported: dict[str, Any]) -> bool:
    rows = [row for row in read_rows(run_dir.ledger) if row["event"] == "exported" and row["step"] == exported["step"]]
    return bool(rows) and rows[-1]["checkpoint"] == exported["checkpoint"]


def _link(link: Path, target: Path) -> None:
    """Points a relative link at a sibling, replacing an old one atomically."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    temporary.symlink_to(target.name)
    temporary.replace(link)

"""Weights & Biases: one run however many attempts, written by the coordinator alone.

W&B is a projection of metrics.jsonl. `log(step=…)` drops rows that lie behind, so the step is never passed:
`train/step` is logged and declared the x axis. All calls happen on a thread of their own, because `init` takes
seconds and a full disk or dead network must not reach training.

What W&B has already is asked of its server when a run goes on there. Offline, a marker beside the files says it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.alerts import Alert
from dist_ft.monitor.sink import Answers, SinkRun, eval_numbers, step_numbers
from dist_ft.storage.publish import read_json, write_json

logger = logging.getLogger(__name__)

_SAFE_AGE_S = 30.0  # a killed writer loses up to a 32 KB block: rows were missing at 5 s, present at 20 s
_CLOSE_LIMIT_S = 30.0
_Item = StepRow | dict[str, Any] | Alert | Answers | str
"""A step, numbers, what a person should see, or the final state."""
_FIRST_WAIT_S, _MAX_WAIT_S = 1.0, 600.0


def resolve_mode(setting: str) -> Literal["online", "offline", "disabled"]:
    """Return the W&B mode for `monitor.wandb`; `auto` is online only with a key in the environment."""
    if setting == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if setting == "online":
        return "online"
    return "offline" if setting == "offline" else "disabled"


def build(sink_id: str, mode: str, run: SinkRun) -> WandbSink:
    """Make the sink of a run.

    Raises:
        OSError: The directory of W&B's files cannot be written.
    """
    steps = run.read_history().steps
    return WandbSink(
        sink_id, run.name, run.project, "online" if mode == "online" else "offline", run.directory, run.config, steps
    )


class WandbSink:
    """Sends rows to one W&B run.

    Args:
        run_id: W&B id, kept in run.json over all attempts.
        name: Run name.
        project: W&B project.
        mode: `online` or `offline`.
        directory: Run directory; W&B makes `wandb/` in it.
        config: Resolved run config, shown in W&B.
        backlog: Rows already in metrics.jsonl; those that W&B lacks are sent first.
    """

    def __init__(
        self,
        run_id: str,
        name: str,
        project: str,
        mode: Literal["online", "offline"],
        directory: Path,
        config: Mapping[str, Any],
        backlog: Sequence[StepRow] = (),
    ) -> None:
        self._settings: dict[str, Any] = {
            "id": run_id,
            "name": name,
            "project": project,
            "mode": mode,
            "dir": str(directory),
        }
        self._config = config
        self._marker = directory / "wandb" / "sent.json"
        (directory / "wandb").mkdir(parents=True, exist_ok=True)
        self._sent_step = 0 if mode == "online" else self._read_marker()
        self._queue: queue.Queue[_Item] = queue.Queue()
        self._is_closing = threading.Event()
        for row in backlog:
            self.log_step(row)
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def log_step(self, row: StepRow) -> None:
        """Queues a step; replayed steps are left out, so the step axis never runs backwards."""
        if row.step <= self._sent_step:
            return
        self._sent_step = row.step
        self._queue.put(row)

    def log_eval(self, row: EvalRow) -> None:
        """Queues an evaluation. One that lies behind, such as the base model's, goes into the summary."""
        values = eval_numbers(row)
        if row.step < self._sent_step:
            self._queue.put({f"{key}/step-{row.step}": value for key, value in values.items()})
        else:
            self._queue.put({"train/step": row.step, **values})

    def log_answers(self, answers: Answers) -> None:
        """Queues a table, `eval/answers`."""
        self._queue.put(answers)

    def send_alert(self, alert: Alert) -> None:
        """Queue an alert; W&B sends it to whoever asked for alerts there."""
        self._queue.put(alert)

    def close(self, state: str) -> None:
        """Send what is queued and finish the run, within 30 s."""
        self._queue.put(state)
        self._is_closing.set()
        self._thread.join(_CLOSE_LIMIT_S)
        if self._thread.is_alive():
            logger.warning("W&B did not finish within %.0f s; `wandb sync` can send the rest", _CLOSE_LIMIT_S)

    def _run(self) -> None:
        first = self._queue.get()  # only now: its start-up would compete with that of the ranks
        try:
            # disable_git: the repository around is none of the run's, and its remote's URL may hold a token.
            import wandb

            settings = wandb.Settings(console="off", silent=True, x_disable_stats=False, disable_git=True)
            resume: Literal["allow"] | None = "allow" if self._settings["mode"] == "online" else None
            wait_s = _FIRST_WAIT_S
            while True:
                is_last_try = self._is_closing.is_set()
                try:
                    run = wandb.init(**self._settings, config=dict(self._config), resume=resume, settings=settings)
                    break
                except Exception as error:  # such as a server that does not answer; rows stay queued
                    if is_last_try:
                        raise
                    wandb.teardown()  # its process keeps the id of a run that it could not open
                    logger.warning("W&B cannot be opened and is tried again in %.0f s: %s", wait_s, error)
                    self._is_closing.wait(wait_s)
                    wait_s = min(2 * wait_s, _MAX_WAIT_S)
            run.define_metric("train/step")
            run.define_metric("*", step_metric="train/step")
            # 0 offline and in a new run: the summary is what the server has of a run that goes on.
            last_step = self._send_rows(run, first, int(run.summary.get("train/step") or 0))
            # finish() only asks W&B's process to close its file: without this wait the last block, which may be
            # all there is, is lost when that process ends soon after.
            wandb.teardown()
            self._write_marker(last_step)
        except Exception:  # a sink must never end a run, whatever its library raises
            logger.exception("W&B failed; metrics.jsonl has every row")

    def _send_rows(self, run: Any, item: _Item, known_step: int) -> int | None:
        """Send until the state arrives, and finish the run. Return the last step that is not marked yet.

        Args:
            run: The run of W&B.
            item: The first that was queued.
            known_step: Last step that W&B's server has.
        """
        import wandb

        pending: list[tuple[float, int]] = []  # (sent at, step) not yet certain to be on disk
        while True:
            if isinstance(item, str):
                run.summary["run/state"] = item
                run.finish(exit_code=0 if item in ("completed", "stopped") else 1)
                return pending[-1][1] if pending else None
            if isinstance(item, Alert):
                run.alert(f"{item.run}: {item.kind}", item.text, level="ERROR" if item.is_bad else "INFO")
                item = self._queue.get()
                continue
            if isinstance(item, Answers):
                table = wandb.Table(columns=item.columns, data=item.cells)
                run.log({"train/step": item.step, "eval/answers": table})
                item = self._queue.get()
                continue
            if isinstance(item, StepRow):
                if item.step > known_step:
                    run.log({"train/step": item.step, **step_numbers(item)})
                    pending.append((time.monotonic(), item.step))
            elif "train/step" in item:
                run.log(item)
            else:
                run.summary.update(item)
            safe = [step for sent, step in pending if time.monotonic() - sent > _SAFE_AGE_S]
            if safe:
                self._write_marker(safe[-1])
                pending = pending[len(safe) :]
            item = self._queue.get()

    def _read_marker(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            return int(read_json(self._marker)["step"])
        return 0

    def _write_marker(self, step: int | None) -> None:
        if step is not None:
            write_json(self._marker, {"step": step})

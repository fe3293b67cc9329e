"""MLflow: one run however many attempts, written by the coordinator alone.

The run carries the sink's id as a tag and is found by it, so the id is known before any server answers. What the
server holds decides what is sent: after an outage or a restart the sink asks for it, and sends the rest from the run's
files. All calls happen on a thread of their own, because a server may be slow or away.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from dist_ft.errors import ConfigError
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.sink import Answers, SinkRun, eval_numbers, step_numbers
from dist_ft.storage.urls import redacted

logger = logging.getLogger(__name__)

URI_VARIABLE = "MLFLOW_TRACKING_URI"
ID_TAG = "dist_ft.sink_id"
_TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow's page finds tables
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_STEP_MARK = "run/attempt"  # stands in every row, so its history says which steps there are
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # that MLflow takes in one request
_MAX_WAIT_S = 30.0
_CLOSE_LIMIT_S = 30.0
_PARAM_CHARS = 6000  # MLflow's limit of a value
_ENVIRONMENT = {
    # Its own retries would hold a call up for minutes, and make a second run where only the answer to the first was
    # lost. The sink tries again by itself, and asks first what is there.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # No usage data leaves the machine, and no address is printed among a run's output.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Defaults for MLflow's own settings, where the user has set none."""

Row = TypeVar("Row", StepRow, EvalRow)


def resolve_mode(setting: str) -> Literal["online", "offline", "disabled"]:
    """Return the mode for `monitor.mlflow`; `auto` is online only with a tracking URI in the environment."""
    if setting == "auto":
        return "online" if os.environ.get(URI_VARIABLE) else "offline"
    if setting == "online":
        return "online"
    return "offline" if setting == "offline" else "disabled"


def check(setting: str) -> None:
    """Check that this machine can log to MLflow as `monitor.mlflow` says.

    Raises:
        ConfigError: A package is missing, or the tracking URI is missing or of no kind that works.
    """
    mode = resolve_mode(setting)
    if mode == "disabled":
        return
    missing = [name for name in ("mlflow", "sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"monitor.mlflow={setting} needs {', '.join(missing)}, which is not installed; "
            "run `pip install dist-ft[mlflow]`, or set monitor.mlflow=disabled"
        )
    if mode == "online":
        uri = os.environ.get(URI_VARIABLE, "")
        if not uri:
            raise ConfigError(
                f"monitor.mlflow=online needs a server, but {URI_VARIABLE} is not set in the environment; "
                "set it, or monitor.mlflow=offline"
            )
        scheme = uri.partition(":")[0].partition("+")[0].lower()
        if scheme not in _SCHEMES:
            raise ConfigError(
                f"{URI_VARIABLE}={redacted(uri)} is no server or database (MLflow 3 refuses files); "
                "use http://HOST:PORT, https://HOST or sqlite:////PATH/mlflow.db"
            )


def build(sink_id: str, mode: str, run: SinkRun) -> MlflowSink:
    """Make the sink of a run.

    Raises:
        ConfigError: See `check`.
        OSError: The directory of the offline database cannot be written.
    """
    check(mode)
    if mode == "online":
        return MlflowSink(sink_id, os.environ[URI_VARIABLE], run)
    folder = run.directory / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    return MlflowSink(sink_id, f"sqlite:///{folder.absolute() / 'mlflow.db'}", run, folder.absolute() / "artifacts")


class MlflowSink:
    """Sends rows to one MLflow run, on a thread of its own.

    The rows are in the run's files before they come here. So the buffer is bounded, and what it has no room for, or
    what was on its way when the server went away, is read from there.

    Args:
        sink_id: Id of the sink, kept in run.json over all attempts.
        uri: Tracking URI. It may hold a password and is neither logged nor stored.
        run: The run.
        artifacts: Where a new experiment in a local database keeps artifacts; None leaves it to the server.
        first_wait_s: Seconds before the second try of what failed; doubled each time, up to half a minute.
        buffer_rows: Rows that are held for a server that is slow.
    """

    def __init__(
        self,
        sink_id: str,
        uri: str,
        run: SinkRun,
        artifacts: Path | None = None,
        first_wait_s: float = 1.0,
        buffer_rows: int = 10_000,
    ) -> None:
        self._uri = uri
        self._first_wait_s = first_wait_s
        self._buffer_rows = buffer_rows
        self._read_history = run.read_history
        self._connect: Callable[[], _MlflowRun] = lambda: _MlflowRun(uri, sink_id, run, artifacts)
        self._lock = threading.Lock()
        self._steps: list[StepRow] = []
        self._evals: list[EvalRow] = []
        self._answers: list[Answers] = []
        self._has_lost_rows = True  # those of earlier attempts, at first
        self._times_ms: dict[int, int] = {}
        self._state: str | None = None
        self._deadline = 0.0
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_step(self, row: StepRow) -> None:
        """Queues a step; one that stands there already, replayed after a rollback, is left out when it is sent."""
        self._queue(self._steps, row)

    def log_eval(self, row: EvalRow) -> None:
        """Queues an evaluation."""
        self._queue(self._evals, row)

    def log_answers(self, answers: Answers) -> None:
        """Queues a table, `answers/step-….json`."""
        self._answers.append(answers)
        self._wanted.set()

    def close(self, state: str) -> None:
        """Send what is queued and end the run, within 30 s."""
        self._deadline = time.monotonic() + _CLOSE_LIMIT_S
        self._state = state
        self._closing.set()
        self._wanted.set()
        self._thread.join(_CLOSE_LIMIT_S)
        if self._thread.is_alive():
            logger.warning("MLflow did not finish within %.0f s; metrics.jsonl has every row", _CLOSE_LIMIT_S)

    def _queue(self, rows: list[Row], row: Row) -> None:
        with self._lock:
            if len(rows) < self._buffer_rows:
                rows.append(row)
            else:
                self._has_lost_rows = True
        self._wanted.set()

    def _work(self) -> None:
        mlflow_run: _MlflowRun | None = None
        wait_s, last_said = self._first_wait_s, ""
        while True:
            self._wanted.wait()  # also before the first row: the start-up would compete with that of the ranks
            self._wanted.clear()
            state = self._state  # before the queue is emptied: nothing comes after the state
            try:
                mlflow_run = mlflow_run or self._connect()
                self._send(mlflow_run)
                if state is not None:
                    mlflow_run.finish(state)
                    return
                wait_s, last_said = self._first_wait_s, ""
            except Exception as error:  # a sink must never end a run, whatever its library raises
                mlflow_run, self._has_lost_rows = None, True  # what arrived is not known, so the next try asks
                shown = redacted(self._uri)
                said = f"{type(error).__name__}: {error}".replace(self._uri, shown)[:500]
                if said != last_said:
                    logger.warning("MLflow (%s) failed and is tried again: %s", shown, said)
                last_said = said
                if self._closing.is_set() and time.monotonic() + wait_s > self._deadline:
                    logger.warning("MLflow did not get every row; metrics.jsonl has them")
                    return
                # Once the run ends a wait cannot be cut short any more.
                time.sleep(wait_s) if self._closing.is_set() else self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
                self._wanted.set()

    def _send(self, mlflow_run: _MlflowRun) -> None:
        with self._lock:
            steps, evals, has_lost_rows = self._steps, self._evals, self._has_lost_rows
            self._steps, self._evals, self._has_lost_rows = [], [], False
        if has_lost_rows:
            history = self._read_history()
            queued = {(row.step, row.attempt): row for row in steps}  # with the numbers of nodes, which files lack
            known = [queued.get((row.step, row.attempt), row) for row in history.steps]
            mlflow_run.send(known, history.evals, self._times_ms)
        mlflow_run.send(steps, evals, self._times_ms)
        self._times_ms.clear()
        while self._answers:
            mlflow_run.send_answers(self._answers[0])
            del self._answers[0]  # after an error it is sent again, under the same name


class _MlflowRun:
    """The MLflow run of a sink: knows what stands there and adds the rest."""

    def __init__(self, uri: str, sink_id: str, run: SinkRun, artifacts: Path | None) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        self._make_metric = Metric
        known = self._client.get_experiment_by_name(run.project)
        if known is None:
            location = artifacts.as_uri() if artifacts else None
            experiment_id = self._client.create_experiment(run.project, artifact_location=location)
        else:
            experiment_id = known.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{sink_id}'")
        if found:
            self._id = str(found[0].info.run_id)
            self._client.update_run(self._id, status="RUNNING")
        else:
            made = self._client.create_run(experiment_id, tags={ID_TAG: sink_id}, run_name=run.name)
            self._id = str(made.info.run_id)
        params = [Param(key, value[:_PARAM_CHARS]) for key, value in _flat(run.config) if value]
        if not self._client.get_run(self._id).data.params:  # they cannot be changed; a resume may have other settings
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])
        keys = self._client.get_run(self._id).data.metrics
        self._last_step = max((step for _, step in self._points(_STEP_MARK)), default=0) if _STEP_MARK in keys else 0
        self._evaluated = {point for key in keys if key.startswith("eval/") for point in self._points(key)}

    def send(self, steps: Sequence[StepRow], evals: Sequence[EvalRow], times_ms: dict[int, int]) -> None:
        """Send the rows that do not stand there yet. After an error this object is of no use any more.

        Args:
            steps: Rows in step order.
            evals: Evaluations.
            times_ms: Time of each step that may be on its way. MLflow takes the same point with the same time for one,
                so a request that was given up and yet arrives does no harm.
        """
        rows: list[tuple[int, dict[str, float]]] = []
        for row in steps:
            if row.step > self._last_step:
                self._last_step = row.step
                rows.append((row.step, step_numbers(row)))
        for evaluation in evals:
            new = {key: value for key, value in eval_numbers(evaluation).items()
                   if (key, evaluation.step) not in self._evaluated}  # fmt: skip
            self._evaluated |= {(key, evaluation.step) for key in new}
            rows.append((evaluation.step, new))
        batch: list[Any] = []
        for step, numbers in sorted(rows, key=lambda row: row[0]):
            if len(batch) + len(numbers) > _MAX_METRICS:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            time_ms = times_ms.setdefault(step, int(time.time() * 1000))
            batch += [self._make_metric(key, value, time_ms, step) for key, value in numbers.items()]
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def send_answers(self, answers: Answers) -> None:
        """Send a table, in the form in which MLflow's own `log_table` writes it, which needs pandas."""
        path = f"answers/step-{answers.step:08d}.json"
        self._client.log_text(self._id, json.dumps({"columns": answers.columns, "data": answers.cells}), path)
        tables = json.loads(self._client.get_run(self._id).data.tags.get(_TABLES_TAG, "[]"))
        if path not in [table["path"] for table in tables]:
            self._client.set_tag(self._id, _TABLES_TAG, json.dumps([*tables, {"path": path, "type": "table"}]))

    def finish(self, state: str) -> None:
        """End the run; the next attempt opens it again."""
        self._client.set_tag(self._id, "dist_ft.state", state)
        self._client.set_terminated(self._id, {"completed": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))

    def _points(self, key: str) -> list[tuple[str, int]]:
        return [(key, metric.step) for metric in self._client.get_metric_history(self._id, key)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield `section.key` and the value as text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)

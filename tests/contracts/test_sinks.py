"""One contract for every sink: each step once and in order, one run over all attempts, nothing lost in an outage."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow.tracking import MlflowClient

from dist_ft.config.schema import MonitorConfig
from dist_ft.coordinator.calls import CoordinatorCalls
from dist_ft.errors import ConfigError
from dist_ft.messages import Envelope, EvalDone, StepDone
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor import mlflow_sink
from dist_ft.monitor.mlflow_sink import ID_TAG, URI_VARIABLE, MlflowSink
from dist_ft.monitor.sink import Answers, History, Sink, SinkRun
from dist_ft.monitor.sinks import SINKS, add_sink_ids, build_sinks, check_sinks
from dist_ft.run.state import RunRecord
from tests.helpers.json_handler import JsonHandler
from tests.helpers.rows import step_row
from tests.helpers.simulated_run import INPUTS, RUN_ID, run_config
from tests.helpers.wandb_files import history_of

NODE = "system/10.0.0.1/cpu_percent"


@dataclass
class Files:
    """The files of a run, as far as a sink reads them."""

    steps: dict[int, StepRow] = field(default_factory=dict)
    evals: dict[int, EvalRow] = field(default_factory=dict)

    def read(self) -> History:
        return History([self.steps[n] for n in sorted(self.steps)], [self.evals[n] for n in sorted(self.evals)])


@dataclass
class Feed:
    """The coordinator's side: a row is in the file before a sink gets it."""

    files: Files
    sink: Sink

    def step(self, step: int, attempt: int = 1, **changes: Any) -> None:
        self.files.steps[step] = row = step_row(step, attempt, loss=1 / step, **changes)
        self.sink.log_step(row)

    def eval(self, step: int, attempt: int = 1, **metrics: float | None) -> None:
        self.files.evals[step] = row = EvalRow(step, attempt, metrics)
        self.sink.log_eval(row)

    def answer(self, step: int) -> None:
        rows = [{"prompt": f"question {n}", "reference": "yes", "base": "no", "tuned": "yés"} for n in range(3)]
        self.sink.log_answers(Answers(step, rows))


@dataclass
class Logged:
    """What somebody sees who opens the sink.

    Attributes:
        steps: Steps of `train/loss` in the order in which they stand there.
        evals: `(step, value)` of `eval/eval_loss`.
        num_runs: Runs with the sink's id.
        state: Final state as the sink spells it.
        seed: `run.seed` of the config.
        node: `(step, value)` of `system/10.0.0.1/cpu_percent`.
    """

    steps: list[int]
    evals: list[tuple[int, float]]
    num_runs: int
    seed: Any
    node: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Kind:
    """One kind of sink under test."""

    name: str
    directory: Path
    uri: str | None = None
    sink_id: str = "abc12345"

    def open(self, files: Files) -> Feed:
        run = SinkRun("name", "project", self.directory, {"run": {"seed": 7}, "data": {"train": [1, "a"]}}, files.read)
        if self.uri is not None:
            return Feed(files, MlflowSink(self.sink_id, self.uri, run, first_wait_s=0.05))
        (sink,) = build_sinks(MonitorConfig(**self.settings), {self.name: self.sink_id}, run)
        return Feed(files, sink)

    @property
    def settings(self) -> dict[str, Any]:
        return {"wandb": "disabled", "mlflow": "disabled", self.name: "offline"}

    def read(self) -> Logged:
        if self.name == "wandb":
            rows, ids, configs = history_of(self.directory, self.sink_id)
            return Logged(
                [row["train/step"] for row in rows if "train/loss" in row],
                [(row["train/step"], row["eval/eval_loss"]) for row in rows if "eval/eval_loss" in row],
                len(ids),
                configs[0]["run"]["seed"],
                [(row["train/step"], row[NODE]) for row in rows if NODE in row],
            )
        client, runs = self._mlflow_runs()
        run_id = runs[0].info.run_id
        losses, evals, node = (
            sorted(client.get_metric_history(run_id, key), key=lambda metric: (metric.timestamp, metric.step))
            for key in ("train/loss", "eval/eval_loss", NODE)
        )
        return Logged(
            [metric.step for metric in losses],
            [(metric.step, metric.value) for metric in evals],
            len(runs),
            int(runs[0].data.params["run.seed"]),
            [(metric.step, metric.value) for metric in node],
        )

    def read_table(self) -> dict[str, Any]:
        """The only table of the run, `columns` and `data`."""
        if self.name == "wandb":
            rows, _, _ = history_of(self.directory, self.sink_id)
            (row,) = [row for row in rows if any(key.startswith("eval/answers") for key in row)]
            assert row["train/step"] == 8
            (file,) = self.directory.glob("wandb/offline-run-*/files/media/table/eval/answers_*.table.json")
            return json.loads(file.read_text())  # type: ignore[no-any-return]
        client, runs = self._mlflow_runs()
        (table,) = json.loads(runs[0].data.tags["mlflow.loggedArtifacts"])
        assert table == {"path": "answers/step-00000008.json", "type": "table"}
        path = client.download_artifacts(runs[0].info.run_id, table["path"], str(self.directory))
        return json.loads(Path(path).read_text())  # type: ignore[no-any-return]

    def _mlflow_runs(self) -> tuple[MlflowClient, list[Any]]:
        client = MlflowClient(tracking_uri=self.uri or f"sqlite:///{self.directory / 'mlflow' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("project")
        return client, client.search_runs([experiment.experiment_id], f"tags.`{ID_TAG}` = '{self.sink_id}'")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that has its tables: making them takes seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    port = _free_port()
    process = _start_server(folder, port)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


@pytest.fixture(params=["wandb", "mlflow", "mlflow-server"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    if request.param == "wandb":
        return Kind("wandb", tmp_path)
    if request.param == "mlflow":
        (tmp_path / "mlflow").mkdir()
        (tmp_path / "mlflow" / "mlflow.db").write_bytes(request.getfixturevalue("template").read_bytes())
        return Kind("mlflow", tmp_path)
    return Kind("mlflow", tmp_path, request.getfixturevalue("server"), sink_id=tmp_path.name)  # of a shared server


def test_every_row_stands_there_once_and_in_order(kind: Kind) -> None:
    feed = kind.open(Files())
    feed.eval(0, eval_loss=4.5)
    for step in range(1, 121):  # more than one request
        feed.step(step)
    feed.eval(120, eval_loss=0.5, exact_match=0.25, perplexity=None)
    feed.sink.close("completed")
    found = kind.read()
    assert found.steps == list(range(1, 121))
    assert found.evals == [(0, 4.5), (120, 0.5)]
    assert (found.num_runs, found.seed) == (1, 7)


def test_sample_answers_stand_there_as_a_table(kind: Kind) -> None:
    feed = kind.open(Files())
    feed.step(8)
    feed.eval(8, exact_match=1.0)
    feed.answer(8)
    feed.sink.close("completed")
    table = kind.read_table()
    assert table["columns"] == ["prompt", "reference", "base", "tuned"]
    assert table["data"] == [[f"question {n}", "yes", "no", "yés"] for n in range(3)]
    assert kind.read().steps == [8]


def test_what_a_node_did_stands_at_the_step_that_it_came_with(kind: Kind) -> None:
    feed = kind.open(Files())
    for step in (1, 2, 3):
        feed.files.steps[step] = row = step_row(step)
        feed.sink.log_step(replace(row, metrics={NODE: 12.5}) if step == 2 else row)
    feed.sink.close("completed")
    found = kind.read()
    assert (found.steps, found.node) == ([1, 2, 3], [(2, 12.5)])


def test_replayed_steps_stand_there_once(kind: Kind) -> None:
    feed = kind.open(Files())
    for step, attempt in [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2)]:
        feed.step(step, attempt)
    feed.sink.close("completed")
    assert kind.read().steps == [1, 2, 3, 4]


def test_a_step_whose_update_was_left_out_has_no_loss_and_is_no_gap(kind: Kind) -> None:
    feed = kind.open(Files())
    feed.step(1)
    feed.files.steps[2] = row = step_row(2, loss=None, grad_norm=None)
    feed.sink.log_step(row)
    feed.step(3)
    feed.sink.close("completed")
    assert kind.read().steps == [1, 3]


def test_attempts_write_one_run_and_the_next_sends_what_the_last_has_lost(kind: Kind) -> None:
    files = Files()
    first = kind.open(files)
    for step in range(1, 5):
        first.step(step)
    first.sink.close("failed")
    for step in (5, 6):  # the coordinator died with them
        files.steps[step] = step_row(step)
    second = kind.open(files)
    second.step(5, attempt=2)
    second.step(6, attempt=2)
    second.step(7, attempt=2)
    second.sink.close("completed")
    found = kind.read()
    assert found.steps == [1, 2, 3, 4, 5, 6, 7]
    assert found.num_runs == 1


def test_a_sink_that_is_closed_without_a_row_disturbs_nobody(kind: Kind) -> None:
    kind.open(Files()).sink.close("failed")


# Outages ---------------------------------------------------------------------


def test_an_outage_loses_nothing_and_holds_nobody_up(tmp_path: Path, template: Path) -> None:
    """The server is away at the start, comes, and goes in the middle of the run."""
    folder, port = tmp_path / "server", _free_port()
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(template.read_bytes())
    kind = Kind("mlflow", tmp_path, f"http://127.0.0.1:{port}")
    feed = kind.open(Files())
    for step in range(1, 11):
        feed.step(step)  # returns, though nobody listens
    process = _start_server(folder, port)
    try:
        _wait_until(lambda: len(kind.read().steps) == 10, process)
        _end(process)
        for step in range(11, 21):
            feed.step(step)
        feed.eval(20, eval_loss=0.5)
        process = _start_server(folder, port)
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        feed.sink.close("completed")
        found = kind.read()
    finally:
        _end(process)
    assert found.steps == list(range(1, 21))
    assert found.evals == [(20, 0.5)]
    assert found.num_runs == 1


class _Silent(http.server.BaseHTTPRequestHandler):
    """Takes a request and answers when the test is over."""

    released = threading.Event()

    def do_GET(self) -> None:
        self.released.wait()

    do_POST = do_GET


def test_a_server_that_never_answers_holds_nobody_up(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        feed = Kind("mlflow", tmp_path, f"http://127.0.0.1:{server.server_address[1]}").open(Files())
        for step in range(1, 1001):
            feed.step(step)  # the test would end in its timeout
    finally:
        _Silent.released.set()
        server.shutdown()
        server.server_close()


class _Moody(JsonHandler):
    """Passes requests on to a real server, but for some, which it answers by the next of `moods`.

    `lost` passes the request on and answers 500, `dropped` hangs up, `late` answers after the client has given up.
    """

    upstream = ""
    moods: Iterator[int | str] = iter(())
    had: ClassVar[set[int | str]] = set()
    num_requests = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).num_requests += 1
        mood = next(self.moods) if self.num_requests % 13 == 0 else None  # a connection takes eight
        self.had.add(mood or 200)
        if mood == "dropped":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if mood in (429, 500):
            self.answer(int(mood), b"{}")
            return
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        request = urllib.request.Request(self.upstream + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        if mood == "late":
            time.sleep(1.5)  # what is under test is a server that is slower than the limit of a second
        with contextlib.suppress(OSError):
            self.answer(500 if mood == "lost" else status, b"{}" if mood == "lost" else text)

    do_GET = do_PATCH = do_POST


def test_a_moody_server_gets_every_row_once(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    handler = type("Moody", (_Moody,), {"upstream": server, "had": set()})
    handler.moods = itertools.cycle(["lost", 429, "late", 500, "dropped"])
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    kind = Kind("mlflow", tmp_path, f"http://127.0.0.1:{proxy.server_address[1]}", sink_id=tmp_path.name)
    try:
        feed = kind.open(Files())
        step = 0
        while len(handler.had) < 6:  # a row at a time, until every mood was met
            step += 1
            feed.step(step)
            _let_send(feed.sink)
        feed.eval(step, eval_loss=0.5)
        feed.sink.close("completed")
    finally:
        proxy.shutdown()
        proxy.server_close()
    found = replace(kind, uri=server).read()
    assert found.steps == list(range(1, step + 1))
    assert (found.evals, found.num_runs) == ([(step, 0.5)], 1)


def _let_send(sink: Sink) -> None:
    """Wait until nothing is queued, so that each row is a request."""
    assert isinstance(sink, MlflowSink)
    while sink._steps:
        time.sleep(0.01)


def test_a_buffer_that_runs_over_is_filled_up_from_the_files(tmp_path: Path, template: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    kind = Kind("mlflow", tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    files = Files()
    run = SinkRun("name", "project", tmp_path, {"run": {"seed": 7}}, files.read)
    feed = Feed(files, MlflowSink(kind.sink_id, kind.uri or "", run, buffer_rows=3))
    for step in range(1, 101):
        feed.step(step)
    feed.eval(100, eval_loss=0.5)
    feed.sink.close("completed")
    assert kind.read().steps == list(range(1, 101))


# Settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mlflow", "uri", "message"),
    [
        ("online", None, "MLFLOW_TRACKING_URI is not set"),
        ("online", "file:///tmp/x", "no server or database"),
        ("auto", "/tmp/x", "no server or database"),
        ("online", "ftp://user:planted@host/x", "no server or database"),
    ],
)
def test_a_wrong_setting_fails_before_the_start(
    mlflow: str, uri: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    if uri:
        monkeypatch.setenv(URI_VARIABLE, uri)
    with pytest.raises(ConfigError, match=message) as caught:
        check_sinks(MonitorConfig.model_validate({"mlflow": mlflow}))
    assert "planted" not in str(caught.value)


def test_a_missing_package_fails_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sink.importlib.util, "find_spec", lambda name: None if name == "alembic" else name)
    with pytest.raises(ConfigError, match=r"needs alembic, .* run `pip install dist-ft\[mlflow\]`"):
        check_sinks(MonitorConfig(mlflow="offline"))
    check_sinks(MonitorConfig(mlflow="disabled"))


@pytest.mark.parametrize("name", sorted(SINKS))
def test_a_directory_that_cannot_be_written_fails_when_the_sink_is_made(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("in the way")
    with pytest.raises(OSError, match=name):
        Kind(name, tmp_path).open(Files())


def test_any_number_of_sinks_at_once_each_with_an_id_of_its_own(tmp_path: Path) -> None:
    both = MonitorConfig(wandb="offline", mlflow="offline")
    ids = add_sink_ids(both, {"wandb": "known"})
    assert ids["wandb"] == "known"
    assert sorted(ids) == ["mlflow", "wandb"]
    assert add_sink_ids(MonitorConfig(wandb="disabled"), {}) == {}
    assert add_sink_ids(MonitorConfig(wandb="disabled"), ids) == ids  # it may be enabled again
    files = Files()
    run = SinkRun("name", "project", tmp_path, {"run": {"seed": 7}}, files.read)
    sinks = build_sinks(both, dict.fromkeys(("wandb", "mlflow"), Kind.sink_id), run)
    for sink in sinks:
        Feed(files, sink).step(1)
    for sink in sinks:
        sink.close("completed")
    assert [Kind(name, tmp_path).read().steps for name in ("wandb", "mlflow")] == [[1], [1]]


def test_a_restarted_coordinator_keeps_one_run_in_every_sink(tmp_path: Path, template: Path) -> None:
    """The rows go the way of real ones: over the wire, through the coordinator, from its files after a restart."""
    config = run_config()
    config = config.model_copy(update={"monitor": MonitorConfig(wandb="offline", mlflow="offline", project="project")})
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(template.read_bytes())
    ids = dict.fromkeys(("wandb", "mlflow"), Kind.sink_id)
    for steps in [(1, 2, 3), (1, 2, 3, 4, 5)]:
        calls = CoordinatorCalls("secret")
        record = RunRecord(RUN_ID, max_steps=60, sink_ids=ids)
        calls.ask("secret", "begin", config, str(tmp_path), str(tmp_path), record, INPUTS, False)
        deadline = time.monotonic() + 60
        while (attempt := calls.ask("secret", "open_attempt", 1)) is None:  # it looks for a checkpoint on a thread
            assert time.monotonic() < deadline
            time.sleep(0.01)
        calls.handle(Envelope(RUN_ID, attempt, 0, EvalDone(EvalRow(0, attempt, {"eval_loss": 4.5}))).to_dict())
        for step in steps:
            envelope = Envelope(RUN_ID, attempt, 0, StepDone(step_row(step, attempt), []))
            calls.handle(json.loads(json.dumps(envelope.to_dict())))
        calls.ask("secret", "finish", "failed", {})
    for name in ids:
        found = Kind(name, tmp_path).read()
        assert (found.steps, found.num_runs) == ([1, 2, 3, 4, 5], 1)
        assert found.evals[0] == (0, 4.5)


def test_a_password_in_the_uri_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://user:planted@127.0.0.1:{_free_port()}"
    run = SinkRun("name", "project", tmp_path, {}, lambda: History())
    sink = MlflowSink(Kind.sink_id, uri, run, first_wait_s=100)
    sink.log_step(step_row(1))
    sink.close("failed")
    assert "failed and is tried again" in caplog.text
    assert "planted" not in caplog.text


# Servers ---------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True, cwd=folder
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server with its workers, which are its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)

    _wait_until(answers, process)


def _wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server has ended"
        try:
            if is_so():
                return
        except Exception:  # it does not answer yet
            pass
        time.sleep(0.1)
    raise AssertionError("it did not come about")

"""The driver: from a checked config to a finished run. The one wiring place of the driver process.

Nothing of the run directory is touched before the preparation has succeeded, so bad input changes nothing.
Ray starts, the fork server imports and the data is prepared all at the same time: start-up is what a user waits for.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import ray

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config, dump_yaml, with_commit
from dist_ft.config.data_sections import DataConfig
from dist_ft.coordinator.failures import RankFailure, explain
from dist_ft.coordinator.start import check_length, check_resume
from dist_ft.data.shards.counts import describe_left_out
from dist_ft.errors import (
    CoordinatorLostError,
    DistFtError,
    StaleAttemptError,
    StartTimeoutError,
    StorageError,
    WorkerCrashError,
)
from dist_ft.jobs.spec import MissingShards, Preparation, ShardJob, TaskSpec, decode_preparation, encode_files
from dist_ft.layout import read_json, write_json, write_whole
from dist_ft.messages import Phase
from dist_ft.monitor.wandb_sink import resolve_mode
from dist_ft.orchestrate.driver.connect import ClusterInfo, connect
from dist_ft.orchestrate.driver.coordination import CoordinatorHandle
from dist_ft.orchestrate.driver.finish import export_and_measure, numbers
from dist_ft.orchestrate.driver.result import (
    Timeline,
    changed_settings,
    check_sources,
    find_finished,
    persistent,
    with_recorded_commit,
)
from dist_ft.orchestrate.driver.shard_jobs import ShardJobs, make_all
from dist_ft.orchestrate.driver.streamed import StreamedData
from dist_ft.orchestrate.driver.tasks import run_tasks
from dist_ft.orchestrate.workers.processes import ForkServer, run_task
from dist_ft.orchestrate.workers.ray_group import make_trainer
from dist_ft.orchestrate.workers.starters import Starters
from dist_ft.report.console import Console
from dist_ft.run.events import FirstStep, SettingsChanged
from dist_ft.run.outcome import RunResult
from dist_ft.run.place import RECORDS, Run, open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.storage.objects import check_exclusive_creation

_POLL_S = 0.25
_GROUP_END_LIMIT_S = 20.0


def train(config: Config, *, server: ForkServer, began: float, console: Console) -> RunResult:
    """Runs a config to its end, or to a stop, on the cluster it names; goes on with a run that is there.

    Args:
        config: A checked config.
        server: Fork server of this node; already at its imports, which take as long as Ray's start.
        began: Monotonic time at which the command began.
        console: Where progress is shown.

    Raises:
        UserError: Bad input; nothing was changed.
    """
    run_dir = open_run(config.run.address)
    run_dir.fetch(*RECORDS)
    finished = find_finished(config, run_dir)
    if finished is not None:
        console.say(f"{run_dir} is complete; nothing to do")
        return finished
    config = with_recorded_commit(config, run_dir)
    timeline = Timeline(began)
    with contextlib.ExitStack() as stack:
        console.say(
            f"dist-ft: {config.run.name}: {config.method.kind} of {config.model.name}, ZeRO {config.zero_stage}"
        )
        console.say("  starting Ray, checking model and data (a model is fetched or made on first use)")
        preparing = _in_thread(lambda: _prepare(config, server))
        cluster = connect(config)
        stack.callback(ray.shutdown)
        timeline.mark("ray")
        for line in cluster.warnings:
            console.say(f"  {line}", "yellow")
        return _Driver(config, run_dir, console, timeline, server, cluster).run(preparing, stack)


class _Driver:
    """One run of the driver: follows the group, then the tasks after it."""

    def __init__(
        self,
        config: Config,
        run_dir: Run,
        console: Console,
        timeline: Timeline,
        server: ForkServer,
        cluster: ClusterInfo,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._console = console
        self._timeline = timeline
        self._server = server
        self._cluster = cluster
        self._on_gpu = cluster.on_gpu
        self._stop_signal: str | None = None
        self._starters = Starters(server, cluster.on_gpu)
        self._coordinator = CoordinatorHandle(config.run.name)
        self._has_stopped = False
        self._began_at = time.time() - (time.monotonic() - timeline.began)

    def run(self, preparing: Future[Preparation | MissingShards], stack: contextlib.ExitStack) -> RunResult:
        """Starts the group while the preparation is at work, and sees the run through."""
        stack.callback(self._starters.release)
        self._starters.start()
        self._coordinator.call("set_starters", self._starters.paths)
        group = self._start_group()
        found = preparing.result()  # until here Ctrl-C simply ends the command
        self._timeline.mark("prepared" if isinstance(found, Preparation) else "listed")
        self._look_after_starters()
        check_sources(self._run_dir, found.files)
        if isinstance(found, MissingShards):
            self._config = with_commit(self._config, found.commit)
            found = self._make_shards(found.jobs)
        stack.enter_context(self._signals())
        self._begin(found)
        streamed = StreamedData(self._config, found, self._on_gpu)
        state, error = "failed", None
        result: dict[str, Any] = {}
        try:
            outcome, group = self._follow(group, streamed)
            if outcome == "stopped":
                streamed.check()  # a stop that nobody asked for
            state = "stopped" if outcome == "stopped" else "completed"
            if outcome == "completed":
                with contextlib.suppress(Exception):  # how the group ended is known from the ranks
                    group.result(_GROUP_END_LIMIT_S)
                run = (self._config, self._run_dir, self._coordinator)
                num_nodes = len(self._starters.paths)
                result = export_and_measure(*run, self._run_tasks, num_nodes, self._console)
            else:
                result = numbers(self._run_dir)
        except StaleAttemptError as failure:
            # The run is another driver's now, and so are its numbers.
            self._console.close()
            self._coordinator.call("finish", "failed", {})
            return RunResult(self._run_dir.address, "failed", error=failure.to_dict())
        except KeyboardInterrupt:
            interrupted = DistFtError("interrupted at once; --resume goes on after the last checkpoint")
            result, error, state = numbers(self._run_dir), interrupted.to_dict(), "failed"
        except CoordinatorLostError as failure:
            self._console.close()
            return RunResult(self._run_dir.address, "failed", error=failure.to_dict())
        except DistFtError as failure:
            result, error, state = numbers(self._run_dir), failure.to_dict(), "failed"
        except OSError as failure:  # after the training, of the file system or the store
            result, error, state = numbers(self._run_dir), StorageError(str(failure)).to_dict(), "failed"
        self._console.close()
        self._coordinator.call("finish", state, persistent(result), error)
        record = read_json(self._run_dir.run_json)
        return RunResult(
            self._run_dir.address, state, record["step"], attempts=record["attempt"], error=error, **result
        )

    def _start_group(self) -> Future[Any]:
        """Has Ray Train form the group, and again after each failure; the future ends when it gives up."""
        loop_config = {
            "coordinator": self._coordinator.where,
            "on_gpu": self._on_gpu,
            "silence_s": self._config.failure.limits.silence_s,
        }
        trainer = make_trainer(self._config, resources=self._cluster.resources, loop_config=loop_config)
        return _in_thread(trainer.fit)

    def _make_shards(self, missing: Sequence[ShardJob]) -> Preparation:
        """Has all nodes make the token shards that are missing; returns what is then prepared."""
        self._console.say(f"  preparing data: {len(missing)} shards on {len(self._starters.paths)} nodes")
        make_all(ShardJobs(self._config, missing, 1.0, self._on_gpu), self._starters_now, self._console.progress)
        self._timeline.mark("prepared")
        arguments = {"config": self._config.model_dump(mode="json")}
        found = decode_preparation(run_task(self._server.socket_path, "prepare", arguments))
        assert isinstance(found, Preparation)  # it makes what is missing
        return found

    def _starters_now(self) -> Mapping[str, str]:
        self._look_after_starters()
        return self._starters.paths

    def _begin(self, prepared: Preparation) -> None:
        """Checks a resume and opens the run's books: the first change on disk."""
        inputs = prepared.inputs
        self._config = with_commit(self._config, inputs.commit)
        store = self._run_dir.store
        previous = read_json(self._run_dir.run_json) if self._run_dir.run_json.exists() else {}
        checkpoints = committed(store)
        if checkpoints:
            check_resume(checkpoints[-1], inputs.fingerprint)
            batch = self._config.train.global_batch_size
            check_length(checkpoints, batch, inputs.max_steps, inputs.num_positions)
        changes = changed_settings(self._config, self._run_dir)
        check_exclusive_creation(store)
        self._run_dir.path.mkdir(parents=True, exist_ok=True)
        write_whole(self._run_dir.config, dump_yaml(self._config))
        write_json(self._run_dir.sources, {"files": encode_files(prepared.files)})
        asked_at = self._run_dir.stop_asked_at()
        if asked_at is not None and asked_at < self._began_at:
            self._run_dir.forget_stop()  # meant for an earlier attempt
        wandb_id = previous.get("wandb_id")
        if wandb_id is None and resolve_mode(self._config.monitor.wandb) != "disabled":
            wandb_id = uuid.uuid4().hex[:8]
        record = RunRecord(
            self._config.run.name,
            attempt=previous.get("attempt", 0),
            step=checkpoints[-1].step if checkpoints else 0,
            max_steps=inputs.max_steps,
            wandb_id=wandb_id,
            active_s=previous.get("active_s", 0.0) + time.monotonic() - self._timeline.began,
        )
        config = self._config.model_dump(mode="json")
        place = (self._run_dir.address, str(self._run_dir.path))
        self._coordinator.begin(config, *place, asdict(record), inputs.to_dict(), self._on_gpu)
        self._timeline.mark("coordinator")
        if changes:
            self._coordinator.call("add_event", SettingsChanged(changes))
        _say_data(self._console, inputs, self._config.data)

    def _follow(self, group: Future[Any], streamed: StreamedData) -> tuple[str, Future[Any]]:
        """Shows progress until the group has ended; returns `completed` or `stopped`, and the last group.

        Raises:
            DistFtError: The group failed, or never started.
        """
        waiting_since = time.monotonic()  # for workers; not while there is a group
        num_events, restarts = 0, 0
        while True:
            status = self._coordinator.call("poll", num_events)
            if self._coordinator.restarts != restarts:  # it has a new ledger, and no memory of a stop
                num_events, restarts = 0, self._coordinator.restarts
                self._coordinator.call("set_starters", self._starters.paths)
                if self._has_stopped:
                    self._coordinator.call("request_stop", "asked before the coordinator was restarted")
                continue
            num_events += len(status["ledger"])
            self._console.update(status)
            self._note_start(status)
            self._look_after_starters()
            if streamed.look(self._starters.paths):
                self._coordinator.call("request_stop", "a shard of the data cannot be prepared")
            streamed.check_patience()
            if self._stop_signal is not None:
                self._coordinator.call("request_stop", self._stop_signal)
                self._stop_signal = None
            decision = status["decision"]
            if decision is not None and not decision["is_restart"]:
                raise explain([RankFailure(**failure) for failure in status["failures"]])
            if status["outcome"] in ("completed", "stopped"):
                return str(status["outcome"]), group
            if group.done():
                # Ray Train has given up, or its controller has died, and with it the workers.
                said = str(group.exception()).strip().splitlines()
                if not self._coordinator.call("decide", f"the worker group ended: {said[-1:]}", [])["is_restart"]:
                    continue  # the next status says it
                group = self._start_group()
                time.sleep(_POLL_S)
            if not status["is_waiting"]:
                waiting_since = time.monotonic()
            elif status["state"] == "stopping":
                return "stopped", group
            elif time.monotonic() - waiting_since > self._config.cluster.start_timeout_s:
                raise _not_started(self._config)
            time.sleep(_POLL_S)

    def _look_after_starters(self) -> None:
        if self._starters.look():
            self._coordinator.call("set_starters", self._starters.paths)

    def _note_start(self, status: dict[str, Any]) -> None:
        """Notes where the seconds before the first step went."""
        marks = self._timeline.marks
        if "first step" in marks:
            return
        if status["world_size"]:
            self._timeline.mark("group")
        if status["world_size"] and len(status["workers"]) == status["world_size"]:
            self._timeline.mark("ranks")
        if status["phases"] and not {Phase.START, Phase.LOAD} & set(status["phases"]):
            self._timeline.mark("loaded")
        if status["row"] is not None:
            self._timeline.mark("first step")
            self._coordinator.call("add_event", FirstStep(marks))
            self._console.say(f"  first step after {marks['first step']:.1f} s ({self._timeline.describe()})", "dim")

    def _run_tasks(self, specs: Sequence[TaskSpec]) -> list[dict[str, Any]]:
        return run_tasks(specs, self._starters.paths, self._on_gpu, self._check_interrupt)

    def _check_interrupt(self) -> None:
        if self._stop_signal is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: checkpoint and stop. Second SIGINT: give up at once."""

        def on_signal(number: int, frame: Any) -> None:
            if self._stop_signal is not None or self._has_stopped:
                raise KeyboardInterrupt
            self._has_stopped = True
            self._stop_signal = signal.Signals(number).name

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _prepare(config: Config, server: ForkServer) -> Preparation | MissingShards:
    """Checks model and data and prepares them; once more when the fork server has died under it."""
    arguments = {"config": config.model_dump(mode="json"), "makes_all": False}
    try:
        return decode_preparation(run_task(server.socket_path, "prepare", arguments))
    except WorkerCrashError:
        if not server.has_ended(within_s=1.0):
            raise  # the task's own fault, such as more memory than there is
        server.restart()
        return decode_preparation(run_task(server.socket_path, "prepare", arguments))


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs a call on a daemon thread; the driver may end before it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _say_data(console: Console, inputs: RunInputs, data: DataConfig) -> None:
    splits = inputs.splits
    if data.preparation == "stream":
        num_shards = sum(split.num_shards for split in splits)
        console.say(f"  data: {num_shards:,} shards, prepared while training goes on; {inputs.max_steps} steps")
        return
    rows, sequences = sum(split.num_rows for split in splits), sum(split.num_sequences for split in splits)
    trained, tokens = sum(split.num_trained_tokens for split in splits), sum(split.num_tokens for split in splits)
    console.say(
        f"  data: {rows:,} rows in {sequences:,} sequences, {tokens:,} tokens, {trained:,} trained; "
        f"{inputs.max_steps} steps"
    )
    for line in describe_left_out(splits, inputs.eval_split, data):
        console.say(f"  {line}", "yellow")


def _not_started(config: Config) -> StartTimeoutError:
    free, total = ray.available_resources(), ray.cluster_resources()
    shown = ", ".join(f"{free.get(k, 0):g} of {total[k]:g} {k}" for k in ("GPU", "CPU") if k in total)
    return StartTimeoutError(
        f"cluster.num_workers={config.cluster.num_workers}: they did not start within cluster.start_timeout_s="
        f"{config.cluster.start_timeout_s:g}; free now: {shown}"
    )

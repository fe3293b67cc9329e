"""Runs the first phase of a driver: prepare model and data, check a resume, and open the run's records.

The run directory is not changed before the preparation has succeeded, so bad input changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from dist_ft.config import Config, dump_yaml, with_commit
from dist_ft.data.shards.counts import total
from dist_ft.data.shards.split import describe_omissions
from dist_ft.errors import WorkerCrashError
from dist_ft.jobs.spec import MissingShards, Preparation, ShardJob, decode_preparation, encode_files
from dist_ft.monitor.sinks import add_sink_ids
from dist_ft.orchestrate.driver.previous import changed_settings, check_resumed, check_sources
from dist_ft.orchestrate.driver.session import Session
from dist_ft.orchestrate.driver.shard_jobs import ShardJobs
from dist_ft.orchestrate.workers.processes import ForkServer, run_task
from dist_ft.run.events import SettingsChanged
from dist_ft.run.run_inputs import RunInputs, summarise
from dist_ft.run.state import RunRecord
from dist_ft.storage.objects import check_exclusive_creation
from dist_ft.storage.publish import read_json, write_json, write_whole

_SHARDS_POLL_S = 0.1


def prepare(config: Config, server: ForkServer) -> Preparation | MissingShards:
    """Check and prepare model and data; try once more if the fork server dies meanwhile."""
    arguments = {"config": config.model_dump(mode="json"), "makes_all": False}
    try:
        return decode_preparation(run_task(server.socket_path, "prepare", arguments))
    except WorkerCrashError:
        if not server.has_ended(within_s=1.0):
            raise  # the task itself failed, for example because it needs more memory than the machine has
        server.restart()
        return decode_preparation(run_task(server.socket_path, "prepare", arguments))


def complete(session: Session, found: Preparation | MissingShards) -> Preparation:
    """Check the sources, and make the missing token shards on all nodes.

    Raises:
        UserError: Bad input; nothing was changed.
    """
    session.timeline.mark("prepared" if isinstance(found, Preparation) else "listed")
    session.refresh_starters()
    check_sources(session.run_dir, found.files)
    if isinstance(found, MissingShards):
        session.config = with_commit(session.config, found.commit)
        session.console.say(f"  preparing data: {len(found.jobs)} shards on {len(session.starters.paths)} nodes")
        _make(session, found.jobs)
        session.timeline.mark("prepared")
        arguments = {"config": session.config.model_dump(mode="json")}
        found = decode_preparation(run_task(session.server.socket_path, "prepare", arguments))
        assert isinstance(found, Preparation)  # it makes what is missing
    session.config = with_commit(session.config, found.inputs.commit)
    if found.to_score:
        model = session.config.objective.kind
        session.console.say(
            f"  scoring data: {len(found.to_score)} shards by the frozen model of objective.kind={model}"
        )
        _make(session, found.to_score)
        session.timeline.mark("scored")
    return found


def _make(session: Session, jobs: Sequence[ShardJob]) -> None:
    """Make shards or their scores, and show the progress."""
    making = ShardJobs(session.config, jobs, 1.0, session.cluster.on_gpu)
    while not making.is_done:
        making.advance(session.refresh_starters())
        session.console.progress(making.progress.line(time.monotonic()))
        time.sleep(_SHARDS_POLL_S)


def open_records(session: Session, prepared: Preparation) -> None:
    """Check a resume, write the run's records, and tell the coordinator of the run. This is the first change on disk.

    Raises:
        UserError: The run cannot continue with this config; nothing was changed.
    """
    config, run_dir, inputs = session.config, session.run_dir, prepared.inputs
    previous = read_json(run_dir.run_json) if run_dir.run_json.exists() else {}
    last_step = check_resumed(config, run_dir, inputs)
    changes = changed_settings(config, run_dir)
    check_exclusive_creation(run_dir.store)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir.config, dump_yaml(config))
    write_json(run_dir.sources, {"files": encode_files(prepared.files)})
    sources = [source.source for source in config.data.train]
    write_json(run_dir.data, {"splits": [asdict(split) for split in summarise(sources, inputs)]})
    worked_s = time.monotonic() - session.timeline.began
    asked_at = run_dir.stop_asked_at()
    if asked_at is not None and asked_at < time.time() - worked_s:
        run_dir.forget_stop()  # the request was for an earlier attempt
    record = RunRecord(
        config.run.name,
        attempt=previous.get("attempt", 0),
        step=last_step,
        max_steps=inputs.max_steps,
        sink_ids=add_sink_ids(config.monitor, previous.get("sink_ids", {})),
        active_s=previous.get("active_s", 0.0) + worked_s,
    )
    session.coordinator.begin(config, run_dir, record, inputs, session.cluster.on_gpu)
    session.timeline.mark("coordinator")
    if changes:
        session.coordinator.add_event(SettingsChanged(changes))
    _say_data(session, inputs)


def _say_data(session: Session, inputs: RunInputs) -> None:
    splits, data = inputs.splits, session.config.data
    if data.preparation == "stream":
        num_shards = sum(split.num_shards for split in splits)
        size = f"{num_shards:,} shards, prepared while training goes on"
    else:
        counts = total(split.known_counts for split in splits)
        size = (
            f"{counts.num_rows:,} rows in {counts.num_sequences:,} sequences, {counts.num_tokens:,} tokens, "
            f"{counts.num_trained_tokens:,} trained"
        )
    session.console.say(f"  data: {size}; {inputs.max_steps} steps")
    for line in describe_omissions(splits, inputs.eval_split, data):
        session.console.say(f"  {line}", "yellow")

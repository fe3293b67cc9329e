"""Runs the driver, from a checked config to a finished run. The only place that wires the driver process.

Ray starts, the fork server imports, and the data is prepared at the same time, because users wait for the start-up.
The phases are in `preparing`, `follow` and `finish`; the ways in which a run may end are in `endings`.
"""

from __future__ import annotations

import contextlib

import ray

from dist_ft.config import Config
from dist_ft.monitor.sinks import check_sinks
from dist_ft.orchestrate.driver.connect import connect
from dist_ft.orchestrate.driver.endings import FAILURES, Ending, Records, ending_of
from dist_ft.orchestrate.driver.export_jobs import BackgroundExports
from dist_ft.orchestrate.driver.finish import close, export_and_measure, read_numbers
from dist_ft.orchestrate.driver.follow import follow
from dist_ft.orchestrate.driver.preparing import complete, open_records, prepare
from dist_ft.orchestrate.driver.previous import find_finished, with_recorded_commit
from dist_ft.orchestrate.driver.session import Timeline, in_thread, open_session
from dist_ft.orchestrate.driver.shard_jobs import StreamedData
from dist_ft.orchestrate.live_page import LivePage
from dist_ft.orchestrate.workers.processes import ForkServer
from dist_ft.report.console import Console
from dist_ft.run.outcome import RunNumbers, RunResult
from dist_ft.run.place import RECORDS, open_run


def train(config: Config, *, server: ForkServer, began: float, console: Console) -> RunResult:
    """Run a config until it completes or stops; continue the run if it exists.

    Args:
        config: A checked config.
        server: Fork server of this node, already importing, which takes as long as Ray's start.
        began: Monotonic time at which the command began.
        console: Shows progress.

    Raises:
        UserError: Bad input; nothing was changed.
    """
    run_dir = open_run(config.run.address)
    run_dir.fetch(*RECORDS)
    finished = find_finished(config, run_dir)
    if finished is not None:
        console.say(f"{run_dir} is complete; nothing to do")
        return finished
    check_sinks(config.monitor)
    config = with_recorded_commit(config, run_dir)
    timeline = Timeline(began)
    page = LivePage(run_dir, config.monitor.report_every_s)
    with contextlib.ExitStack() as stack:
        stack.callback(page.wait)  # after Ray has ended, which takes as long as a page
        kinds = f"{config.objective.kind}, {config.method.kind}"
        console.say(f"dist-ft: {config.run.name}: {kinds} of {config.model.name}, ZeRO {config.zero_stage}")
        console.say("  starting Ray, checking model and data (a model is fetched or made on first use)")
        preparing = in_thread(lambda: prepare(config, server))
        cluster = connect(config, server.directory)
        stack.callback(ray.shutdown)
        timeline.mark("ray")
        for line in cluster.warnings:
            console.say(f"  {line}", "yellow")
        session = open_session(config, run_dir, console, timeline, server, cluster)
        session.page = page
        stack.callback(session.starters.release)
        session.starters.start()
        session.coordinator.set_starters(session.starters.paths)
        group = session.start_group()  # in parallel to the preparation
        found = preparing.result()  # up to here, Ctrl-C simply ends the command
        prepared = complete(session, found)
        stack.enter_context(session.signals.listening())
        open_records(session, prepared)
        streamed = StreamedData(session.config, prepared, cluster.on_gpu)
        exports = BackgroundExports(session)
        try:
            outcome = follow(session, group, streamed, exports)
            if outcome == "stopped":
                streamed.check()  # nobody asked for the stop: a shard may have failed
            ending = Ending(outcome)
            if outcome == "completed":
                exports.finish(session.signals.check)
            numbers = read_numbers(run_dir) if outcome == "stopped" else export_and_measure(session)
        except FAILURES as failure:
            ending = ending_of(failure)
            numbers = read_numbers(run_dir) if ending.records is Records.OURS else RunNumbers()
        result = close(session, ending, numbers)
        if ending.records is Records.OURS:
            page.begin_last()
        return result

"""Training on three hosts that are cut off, switched off, slowed down, added and drained ends as if nothing had been.

Every host has its own address, network, processes and /tmp; only the run directory is shared. The times from a fault
to the next new step are printed at the end of the session.
"""

from __future__ import annotations

import itertools
import time

import pytest

from tests.helpers.rows import read_rows
from tests.helpers.runs import Run
from tests.netns.conftest import STEPS, Cluster

pytestmark = pytest.mark.netns

ELASTIC = "cluster.num_workers=[1,3]"


def test_three_hosts_train_what_one_trains(cluster: Cluster, undisturbed: Run) -> None:
    run = cluster.train("three", "cluster.num_workers=3")
    record = run.wait_for(lambda record: record["step"] >= 8)
    assert {worker["node_ip"] for worker in record["workers"]} == {cluster.hosts.ip(host) for host in (1, 2, 3)}
    _finish_equal(run, undisturbed)
    assert {row["world_size"] for row in run.rows().values()} == {3}
    assert _num_repeated(run) == 0


def test_a_run_goes_on_without_a_host_that_is_switched_off(cluster: Cluster, undisturbed: Run) -> None:
    run = cluster.train("off", ELASTIC)
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.hosts.off(3)
    cluster.wait_for_new_step(run, "host switched off, 3 to 2")
    _finish_equal(run, undisturbed)
    assert run.rows()[STEPS]["world_size"] == 2


def test_a_host_that_is_cut_off_and_comes_back_leaves_no_process_and_writes_nothing(
    cluster: Cluster, undisturbed: Run
) -> None:
    run = cluster.train("unplugged", ELASTIC)
    record = run.wait_for(lambda record: record["step"] >= 8)
    before = [process for process in cluster.hosts.processes(3) if process.inner_pid != 1]
    ranks = {worker["pid"] for worker in record["workers"] if worker["node_ip"] == cluster.hosts.ip(3)}
    assert len(ranks) == 1
    assert ranks <= {process.inner_pid for process in before}
    cluster.hosts.unplug(3)
    cluster.wait_for_new_step(run, "host unplugged, 3 to 2")
    cluster.hosts.plug(3)
    took = cluster.wait_until_all_ended(3, before, 60.0)
    cluster.say(f"host plugged in again: {took:.1f} s until nothing of the old attempt or its Ray node is left there")
    _finish_equal(run, undisturbed)


def test_processes_of_a_host_that_stays_cut_off_end_by_themselves(cluster: Cluster, undisturbed: Run) -> None:
    run = cluster.train("silent", ELASTIC, "failure.limits.silence_s=10")
    record = run.wait_for(lambda record: record["step"] >= 8)
    ranks = {worker["pid"] for worker in record["workers"] if worker["node_ip"] == cluster.hosts.ip(3)}
    # The fork server, which holds no device, ends with its Ray node, and that takes Ray minutes.
    before = [p for p in cluster.hosts.processes(3) if "RayTrainWorker" in p.command or p.inner_pid in ranks]
    assert len(before) == 2, before
    cluster.hosts.unplug(3)
    took = cluster.wait_until_all_ended(3, before, 60.0)
    cluster.say(f"host unplugged for good: {took:.1f} s until its supervisor and rank have ended (limit 10 s)")
    _finish_equal(run, undisturbed)


def test_a_slow_link_changes_nothing_but_time(cluster: Cluster, undisturbed: Run) -> None:
    cluster.hosts.slow(3, delay_ms=100)
    run = cluster.train("slow", "cluster.num_workers=3")
    run.wait_for(lambda record: record["step"] >= 20, limit_s=300)
    cluster.hosts.slow(3, delay_ms=5)  # the other steps would only cost time
    _finish_equal(run, undisturbed)
    rows = run.rows()
    cluster.say(f"link with 100 ms each way: {sorted(rows[s]['step_s'] for s in range(8, 20))[6]:.2f} s a step")
    assert {row["attempt"] for row in rows.values()} == {1}, "a slow host was taken for a lost one"


def test_a_host_that_comes_and_goes_costs_time_only(cluster: Cluster, undisturbed: Run) -> None:
    run = cluster.train("flapping", ELASTIC, "failure.max_same_step=6")
    run.wait_for(lambda record: record["step"] >= 8)
    for _ in range(3):
        cluster.hosts.unplug(3)
        time.sleep(1)
        cluster.hosts.plug(3)
        time.sleep(2)
    cluster.hosts.off(3)
    cluster.hosts.on(3)
    cluster.hosts.off(3)  # while the group is being formed
    began = time.monotonic()
    cluster.wait_for_new_step(run, "host flapped, off, on and off again")
    cluster.hosts.on(3)
    _finish_equal(run, undisturbed)
    cluster.say(f"flapping host: {time.monotonic() - began:.1f} s from the last fault to the end of the run")


def test_a_run_takes_in_a_host_that_joins_and_loses_no_step(cluster: Cluster, undisturbed: Run) -> None:
    cluster.hosts.off(3)
    run = cluster.train("grown", ELASTIC, "cluster.grow_after_s=1", "cluster.grow_if_it_pays=false")
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.hosts.on(3)
    cluster.wait_for_new_step(run, "host joined, 2 to 3")
    _finish_equal(run, undisturbed)
    rows = run.rows()
    assert (rows[1]["world_size"], rows[STEPS]["world_size"]) == (2, 3)
    assert _num_repeated(run) == 0


def test_a_run_leaves_a_host_that_is_drained_and_loses_no_step(cluster: Cluster, undisturbed: Run) -> None:
    run = cluster.train("drained", ELASTIC)
    run.wait_for(lambda record: record["step"] >= 8)
    before = [process for process in cluster.hosts.processes(3) if process.inner_pid != 1]
    cluster.hosts.drain(3)
    cluster.wait_for_new_step(run, "host drained, 3 to 2")
    took = cluster.wait_until_all_ended(3, before, 90.0)
    cluster.say(f"host drained: {took:.1f} s more until its Ray node has ended, of a notice of 60 s")
    _finish_equal(run, undisturbed)
    rows = run.rows()
    assert (rows[1]["world_size"], rows[STEPS]["world_size"]) == (3, 2)
    assert _num_repeated(run) == 0


def test_a_submitted_job_survives_all_that_happens_to_its_hosts(cluster: Cluster, undisturbed: Run) -> None:
    """Switched off, joined, unplugged and healed, joined again, drained: one job, followed to its end."""
    # Half as many sequences a pass: steps that are slow enough for all of it to happen before the last one.
    slow = ("train.micro_batch_size=1", "train.gradient_checkpointing=true")
    run = cluster.submit("job", ELASTIC, "cluster.grow_after_s=0", "cluster.grow_if_it_pays=false", *slow)
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.hosts.off(3)
    cluster.wait_for_new_step(run, "job: host switched off, 3 to 2")
    cluster.hosts.on(3)
    cluster.wait_for_new_step(run, "job: host joined, 2 to 3")
    before = [process for process in cluster.hosts.processes(3) if process.inner_pid != 1]
    cluster.hosts.unplug(3)
    cluster.wait_for_new_step(run, "job: host unplugged, 3 to 2")
    cluster.hosts.plug(3)
    took = cluster.wait_until_all_ended(3, before, 60.0)
    cluster.say(f"job: host plugged in again: {took:.1f} s until nothing of the old attempt is left there")
    cluster.hosts.off(3)
    cluster.hosts.on(3)
    cluster.wait_for_new_step(run, "job: host joined again, 2 to 3")
    cluster.hosts.drain(3)
    cluster.wait_for_new_step(run, "job: host drained, 3 to 2")
    _finish_equal(run, undisturbed)
    assert {row["world_size"] for row in run.all_rows()} == {2, 3}


def _finish_equal(run: Run, whole: Run) -> None:
    """The run completes; its samples are those of the undisturbed run, its losses too, and one attempt wrote at a
    time."""
    code, result, err = run.finish(400)
    assert (code, result["state"]) == (0, "completed"), (result["error"], err)
    rows, wanted = run.rows(), whole.rows()
    assert sorted(rows) == sorted(wanted) == list(range(1, STEPS + 1))
    for key in ("digest", "position", "epoch", "trained_tokens"):
        assert [rows[s][key] for s in sorted(rows)] == [wanted[s][key] for s in sorted(wanted)], key
    # The sums run in another order at another world size.
    losses, wanted_losses = ([of[s]["loss"] for s in sorted(of)] for of in (rows, wanted))
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    writers = [row["attempt"] for row in read_rows(run.dir.metrics)]
    assert writers == sorted(writers), "an attempt wrote after its successor"
    committers = [entry["attempt"] for entry in run.events("commit")]
    assert committers == sorted(committers), "an attempt committed after its successor"


def _num_repeated(run: Run) -> int:
    """How many steps were made more than once."""
    steps = [row["step"] for row in read_rows(run.dir.metrics)]
    return sum(later <= step for step, later in itertools.pairwise(steps))

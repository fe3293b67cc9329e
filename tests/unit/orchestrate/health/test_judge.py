"""What is said of the nodes of a cluster, one fault at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.orchestrate.health import judge
from dist_ft.orchestrate.health.facts import Check, NodeFacts, Requirements, SumResult, WandbFacts

GOOD = NodeFacts(
    shm_bytes=1 << 30, temp_dir="/tmp", temp_free_bytes=9 << 30, gpus=0, driver=None, interface="eth0",
    host_name="a", knows_itself=True, unknown=(), unreached=(), free_port=1, nearest_dir="/shared",
    output_free_bytes=9 << 30,
)  # fmt: skip
FIRST = replace(GOOD, is_first=True)
WANTED = Requirements(output_dir="/shared/runs")
HERE = {"python": "3.11.7", "dist-ft": "0.1.0", "torch": "2.13.0"}


def nodes(**changes: Any) -> dict[str, NodeFacts]:
    """A good node and one with changes."""
    return {"10.0.0.1": FIRST, "10.0.0.2": replace(GOOD, **changes)}


def failed(checks: list[Check]) -> list[str]:
    assert all(check.hint for check in checks if not check.is_ok), "each failure says what to do"
    assert all("\n" not in check.detail for check in checks)
    return [f"{check.name}: {check.detail}" for check in checks if not check.is_ok]


def of_nodes(of_ray: float = 0, **changes: Any) -> list[str]:
    return failed(judge.check_nodes(nodes(**changes), {"10.0.0.1": 0, "10.0.0.2": of_ray}))


def of_storage(unread: dict[str, list[str]] | None = None, **changes: Any) -> list[str]:
    return failed(judge.check_storage(nodes(**changes), unread or {}, WANTED))


def test_good_nodes_pass() -> None:
    assert of_nodes() == of_storage() == []


@pytest.mark.parametrize(
    ("of_ray", "changes", "words"),
    [
        (8, {"gpus": 4}, "devices: 10.0.0.2: Ray has 8 GPUs, /dev has 4"),
        (0, {"shm_bytes": 64 << 20}, "shared memory: 10.0.0.2: 64.0 MiB"),
        (0, {"temp_free_bytes": 1 << 20}, "temp directory: /tmp: 10.0.0.2: 1.0 MiB free, wanted 512 MiB"),
        (0, {"interface": None}, "interfaces: 10.0.0.2: no interface has this address"),
        (0, {"knows_itself": False}, "names: 10.0.0.2 (a) cannot resolve its own name"),
        (0, {"unreached": ["10.0.0.1"]}, "network: no way: 10.0.0.2 → 10.0.0.1"),
    ],
)
def test_a_node_that_is_unfit_is_named(of_ray: float, changes: dict[str, Any], words: str) -> None:
    assert of_nodes(of_ray, **changes) == [words]


def test_names_of_others_that_do_not_resolve_are_said_and_no_fault() -> None:
    names = judge.check_nodes(nodes(unknown=["pod-b"]), {"10.0.0.1": 0, "10.0.0.2": 0})[4]
    assert names.is_ok and "pod-b not everywhere" in names.detail


def test_devices_and_drivers_are_counted() -> None:
    gpu = {"a": replace(GOOD, gpus=8, driver="550.1"), "b": replace(GOOD, gpus=8, driver="560.2"), "c": GOOD}
    devices = judge.check_nodes(gpu, {"a": 8, "b": 0, "c": 0})[0]
    assert devices.is_ok
    assert devices.detail == "1 nodes of 8 GPUs (driver 550.1), 1 nodes of 8 GPUs (driver 560.2)"
    assert devices.hint == "Ray uses no GPU of b"


@pytest.mark.parametrize(
    ("unread", "changes", "words"),
    [
        ({}, {"storage_problem": "Read-only file system"}, "output directory: /shared/runs: 10.0.0.2: Read-only"),
        ({}, {"nearest_dir": "/"}, "the nearest that exists is /, elsewhere /shared"),
        ({"10.0.0.2": ["10.0.0.1"]}, {}, "shared files: /shared/runs: 10.0.0.2 does not see files of 10.0.0.1"),
        ({}, {"is_first": True}, "exclusive creation: /shared/runs: 2 nodes created the same file"),
        ({}, {"output_free_bytes": 5}, "disk: /shared/runs: 10.0.0.2: 5 B free"),
    ],
)
def test_storage_that_is_unfit_is_named(unread: dict[str, list[str]], changes: dict[str, Any], words: str) -> None:
    [line] = of_storage(unread, **changes)
    assert words in line


def test_versions_that_differ_are_named_with_both() -> None:
    other = {**HERE, "torch": "2.8.0", "dist-ft": None}
    [line] = failed([judge.check_versions(HERE, {"a": HERE, "b": other, "c": None})])
    assert line == "versions: b: dist-ft None, here 0.1.0, torch 2.8.0, here 2.13.0; c: no answer"
    assert judge.check_versions(HERE, {"a": HERE}).is_ok


@given(offset=st.floats(-1e4, 1e4), before=st.floats(0, 60), after=st.floats(0, 60))
def test_a_clock_is_blamed_only_for_what_is_certain(offset: float, before: float, after: float) -> None:
    """Whatever the message took, a good clock passes, and one that is off by more than that took fails."""
    check = judge.check_clocks({"a": (offset - before, offset + after)})
    if abs(offset) <= judge.MAX_SKEW_S:
        assert check.is_ok
    if abs(offset) > judge.MAX_SKEW_S + max(before, after):
        assert not check.is_ok and ("ahead" if offset > 0 else "behind") in check.detail


def test_a_node_that_hangs_is_named() -> None:
    [line] = failed(judge.check_answers([f"n{i}" for i in range(7)], "looking", 40))
    assert line == "answers: n0; n1; n2; n3; n4 and 2 more: no answer within 40 s (looking)"
    assert judge.check_answers([], "looking", 40) == []


def test_a_sum_that_failed_names_each_node_and_a_slow_one_is_said() -> None:
    answers = {"a": SumResult(1e9), "b": SumResult(problem="connection refused"), "c": None}
    [line] = failed([judge.check_all_reduce(answers, "gloo", 1 << 24, 75)])
    assert line == "all-reduce: gloo: b: connection refused; c: no answer within 75 s"
    slow = judge.check_all_reduce({"a": SumResult(1e9), "b": SumResult(1e6)}, "gloo", 1 << 24, 75)
    assert slow.is_ok and "over 2 nodes" in slow.detail and "slow" in slow.hint


def test_a_worker_is_on_one_node() -> None:
    halves = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert not judge.check_workers(halves, Requirements(resources={"CPU": 4})).is_ok
    assert judge.check_workers(halves, Requirements(num_workers=2, resources={"CPU": 2})).is_ok
    assert not judge.check_workers([{"CPU": 8, "GPU": 1}], Requirements(num_workers=2)).is_ok


def test_wandb_out_of_reach_is_said_and_a_missing_key_is_a_fault() -> None:
    away = judge.check_wandb(WandbFacts("online", "api.wandb.ai"))
    assert away.is_ok and "does not answer" in away.detail and away.hint
    assert not judge.check_wandb(WandbFacts("online", "api.wandb.ai", "no key")).is_ok

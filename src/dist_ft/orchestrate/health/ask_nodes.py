"""Checks every node of a Ray cluster before a run starts there. Runs in a process that is connected to Ray.

All nodes are asked at the same time, by a task that takes no slot, and every wait has a limit: a node that hangs is
named, and the others are judged without it.
"""

from __future__ import annotations

import bisect
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import ray

from dist_ft.orchestrate.health import probe
from dist_ft.orchestrate.health.facts import Check, NodeFacts, NodeRef, Requirements, SumResult
from dist_ft.orchestrate.health.judge import (
    check_all_reduce,
    check_answers,
    check_clocks,
    check_nodes,
    check_storage,
    check_wandb,
)
from dist_ft.orchestrate.workers.nodes import RayNode, on_node

T = TypeVar("T")

_PROBE_LIMIT_S = 40.0
_SUM_STEP_LIMIT_S = 60.0  # longer than a busy machine takes to import torch
_SUM_LIMIT_S = 3 * _SUM_STEP_LIMIT_S
_CLEAN_LIMIT_S = 10.0
LIMIT_S = 2 * _PROBE_LIMIT_S + _SUM_LIMIT_S + _CLEAN_LIMIT_S
"""The longest time that all checks together take."""
_SUM_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
_MOST_OTHERS = 64  # if each of a thousand nodes tried all others, they would read a million files
_A_GPU = 0.001  # Ray hides all devices from a task that asks for none


@dataclass(frozen=True)
class Member:
    """A node that takes part in the checks.

    Attributes:
        node_id: Ray's id of the node.
        ref: How other nodes reach it.
        resources: Ray resources of the node.
        is_here: Whether this process runs on it.
    """

    node_id: str
    ref: NodeRef
    resources: Mapping[str, float]
    is_here: bool


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The answer of a node.

    Attributes:
        value: The result; None if the call failed.
        problem: Why the call failed.
        ahead: The least and the most that the node's clock may be ahead, in seconds.
    """

    value: T | None
    problem: str | None
    ahead: tuple[float, float]


def members(nodes: Sequence[RayNode], here: str) -> list[Member]:
    """Return the alive nodes of `ray.nodes()`; ids distinguish several nodes at one address."""
    alive = [node for node in nodes if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    found = []
    for node, address in zip(alive, addresses, strict=True):
        label = address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        ref = NodeRef(label, address, node["NodeManagerPort"], node["NodeManagerHostname"])
        found.append(Member(node["NodeID"], ref, node["Resources"], node["NodeID"] == here))
    return found


def probe_nodes(group: Sequence[Member], wanted: Requirements) -> Iterator[Check]:
    """Yield the checks of a group of nodes that have the same dist-ft as this process."""
    scratch = f".dist-ft-doctor-{uuid.uuid4().hex[:8]}"
    output_dir = wanted.output_dir
    try:
        answers = _ask(
            group,
            lambda m: partial(probe.probe_node, m.ref, _others(m, group), output_dir, scratch),
            _PROBE_LIMIT_S,
        )
        yield from _failures(group, answers, "looking at machine and storage")
        facts = {label: answer.value for label, answer in answers.items() if answer.value is not None}
        if not facts:
            return
        there = [member for member in group if member.ref.label in facts]
        yield from check_nodes(facts, {m.ref.label: m.resources.get("GPU", 0.0) for m in there})
        yield from _storage_and_clocks(there, facts, answers, wanted, scratch)
        yield from _all_reduce(there, facts, wanted)
        # The driver's node, on which the coordinator runs.
        here = [member for member in there if member.is_here]
        for answer in _ask(here, lambda _: partial(probe.ask_wandb, wanted.wandb), _PROBE_LIMIT_S).values():
            if answer.value is not None:
                yield check_wandb(answer.value)
    finally:
        if output_dir is not None:
            _ask(group, lambda _: partial(probe.clean_up, output_dir, scratch), _CLEAN_LIMIT_S)


def _storage_and_clocks(
    there: Sequence[Member],
    facts: Mapping[str, NodeFacts],
    before: Mapping[str, Answer[NodeFacts]],
    wanted: Requirements,
    scratch: str,
) -> Iterator[Check]:
    written = [m for m in there if facts[m.ref.label].storage_problem is None]
    output_dir = wanted.output_dir

    def errand(member: Member) -> Callable[[], list[str]]:
        if output_dir is None:
            return list  # only the clock is needed
        return partial(probe.find_unread, member.ref, _others(member, written), output_dir, scratch)

    # All nodes are asked, because a second message narrows the bounds of a node's clock.
    answers = _ask(there, errand, _PROBE_LIMIT_S)
    yield from _failures(there, answers, "reading what others wrote")
    unread = {m.ref.label: answers[m.ref.label].value or [] for m in written if m.ref.label in answers}
    yield from check_storage(facts, unread, wanted)
    offsets = {}
    for label, answer in answers.items():
        (low, high), (second_low, second_high) = before[label].ahead, answer.ahead
        offsets[label] = max(low, second_low), min(high, second_high)
    yield check_clocks(offsets)


def _all_reduce(there: Sequence[Member], facts: Mapping[str, NodeFacts], wanted: Requirements) -> Iterator[Check]:
    """Run the all-reduce over the nodes that can hold a worker; a head without slots has no ranks, maybe no device."""
    on_gpu = any(m.resources.get("GPU") for m in there) and (wanted.resources or {"GPU": 1}).get("GPU", 0) > 0
    kind, backend = ("GPU", "nccl") if on_gpu else ("CPU", "gloo")
    group = [member for member in there if member.resources.get(kind)]
    if not group:
        return
    ranks = {member.node_id: rank for rank, member in enumerate(group)}
    first = (group[0].ref.address, facts[group[0].ref.label].free_port)
    size, num_bytes = len(group), _SUM_BYTES[backend]
    answers = _ask(
        group,
        lambda m: partial(
            probe.all_reduce, m.ref, ranks[m.node_id], first, size, backend, num_bytes, _SUM_STEP_LIMIT_S
        ),
        _SUM_LIMIT_S,
        num_gpus=_A_GPU if on_gpu else 0,
    )
    results: dict[str, SumResult | None] = dict.fromkeys((m.ref.label for m in group), None)
    results |= {label: answer.value or SumResult(problem=answer.problem) for label, answer in answers.items()}
    yield check_all_reduce(results, backend, num_bytes, _SUM_LIMIT_S)


def _failures(group: Sequence[Member], answers: Mapping[str, Answer[T]], during: str) -> Iterator[Check]:
    yield from check_answers([m.ref.label for m in group if m.ref.label not in answers], during, _PROBE_LIMIT_S)
    for label, answer in answers.items():
        if answer.problem is not None:
            hint = "see the log of Ray on this node (/tmp/ray/session_latest/logs)"
            yield Check("answers", False, f"{label}: {answer.problem} ({during})", hint)


def _others(member: Member, group: Sequence[Member]) -> list[NodeRef]:
    """Return the next nodes in a ring. This node tries them, and as many nodes try this one."""
    order = sorted(other.node_id for other in group if other.node_id != member.node_id)
    start = bisect.bisect(order, member.node_id)
    chosen = set((order[start:] + order[:start])[:_MOST_OTHERS])
    return [other.ref for other in group if other.node_id in chosen]


def _ask(
    group: Sequence[Member], errand: Callable[[Member], Callable[[], T]], limit_s: float, num_gpus: float = 0
) -> dict[str, Answer[T]]:
    """Call a function on every node at once; return the answers that come within the limit, by label."""
    remote = ray.remote(num_cpus=0, max_retries=0)(_call_and_read_clock)
    asked = {}
    for member in group:
        options = remote.options(scheduling_strategy=on_node(member.node_id), num_gpus=num_gpus)
        asked[options.remote(errand(member))] = (member.ref.label, time.time())
    answers: dict[str, Answer[T]] = {}
    deadline = time.monotonic() + limit_s
    while asked and (left_s := deadline - time.monotonic()) > 0:
        for reference in ray.wait(list(asked), timeout=left_s)[0]:
            label, sent = asked.pop(reference)
            try:
                clock, value = ray.get(reference)
                answers[label] = Answer(value, None, (clock - time.time(), clock - sent))
            except Exception as error:  # a broken installation there can raise anything
                lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                answers[label] = Answer(None, lines[-1].strip()[:300], (float("-inf"), float("inf")))
    for reference in asked:
        ray.cancel(reference, force=True)
    return answers


def _call_and_read_clock(function: Callable[[], T]) -> tuple[float, T]:
    """Call a function on the node and read its clock, between two readings of the caller's clock."""
    result = function()
    return time.time(), result

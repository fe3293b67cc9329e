"""A look at every node of a Ray cluster before a run starts there. Runs in a process that is connected to Ray.

Every node is asked at the same time, by a task that takes no slot, and every wait has a limit: a node that hangs is
named, and the others are judged without it.
"""

from __future__ import annotations

import bisect
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_ft.orchestrate.health import probe
from dist_ft.orchestrate.health.judge import (
    NodeFacts,
    Wanted,
    check_all_reduce,
    check_answers,
    check_clocks,
    check_nodes,
    check_storage,
    check_wandb,
)
from dist_ft.orchestrate.health.probe import NodeRef
from dist_ft.orchestrate.health.this_machine import Check

_LOOK_LIMIT_S = 40.0
_SUM_STEP_LIMIT_S = 60.0  # longer than a busy machine takes to import torch
_SUM_LIMIT_S = 3 * _SUM_STEP_LIMIT_S
_CLEAN_LIMIT_S = 10.0
LIMIT_S = 2 * _LOOK_LIMIT_S + _SUM_LIMIT_S + _CLEAN_LIMIT_S
"""What the whole takes at most."""
_SUM_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
_MOST_OTHERS = 64  # a thousand nodes that each look at all others would make a million files to read
_A_GPU = 0.001  # Ray hides all devices from a task without any


@dataclass(frozen=True)
class Member:
    """A node that takes part.

    Attributes:
        node_id: Ray's id.
        node: Where it is.
        resources: What Ray has of it.
        is_here: Whether this process runs on it.
    """

    node_id: str
    node: NodeRef
    resources: Mapping[str, float]
    is_here: bool


@dataclass(frozen=True)
class Answer:
    """What a node said.

    Attributes:
        value: Its result; None where it failed.
        problem: Why it failed.
        ahead: The least and the most that its clock may be ahead, in seconds.
    """

    value: Any
    problem: str | None
    ahead: tuple[float, float]


def members(nodes: Sequence[Mapping[str, Any]], here: str) -> list[Member]:
    """Returns the living nodes of `ray.nodes()`; several at one address are told apart by their ids."""
    alive = [node for node in nodes if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    found = []
    for node, address in zip(alive, addresses, strict=True):
        label = address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        reference = NodeRef(label, address, node["NodeManagerPort"], node["NodeManagerHostname"])
        found.append(Member(node["NodeID"], reference, node["Resources"], node["NodeID"] == here))
    return found


def look(group: Sequence[Member], wanted: Wanted) -> Iterator[Check]:
    """Yields the checks of a group of nodes that have this very dist-ft."""
    scratch = f".dist-ft-doctor-{uuid.uuid4().hex[:8]}"
    try:
        answers = _ask(group, lambda m: (probe.look, m.node, _others(m, group), wanted.output_dir, scratch),
                       _LOOK_LIMIT_S)  # fmt: skip
        yield from _failures(group, answers, "looking at machine and storage", _LOOK_LIMIT_S)
        facts = {label: NodeFacts(**answer.value) for label, answer in answers.items() if answer.value}
        if not facts:
            return
        there = [member for member in group if member.node.label in facts]
        yield from check_nodes(facts, {m.node.label: m.resources.get("GPU", 0.0) for m in there})
        yield from _storage_and_clocks(there, facts, answers, wanted, scratch)
        yield from _all_reduce(there, facts, wanted)
        yield from _wandb(there, wanted)
    finally:
        if wanted.output_dir is not None:
            _ask(group, lambda _: (probe.clean_up, wanted.output_dir, scratch), _CLEAN_LIMIT_S)


def _storage_and_clocks(
    there: Sequence[Member], facts: Mapping[str, NodeFacts], before: Mapping[str, Answer], wanted: Wanted, scratch: str
) -> Iterator[Check]:
    written = [m for m in there if facts[m.node.label].storage_problem is None]
    output_dir = wanted.output_dir
    if output_dir is None:
        answers = _ask(there, lambda _: (time.time,), _LOOK_LIMIT_S)
    else:
        # On all nodes: a second message to each sets narrower bounds to its clock.
        answers = _ask(there, lambda m: (probe.unread, m.node, _others(m, written), output_dir, scratch),
                       _LOOK_LIMIT_S)  # fmt: skip
    yield from _failures(there, answers, "reading what others wrote", _LOOK_LIMIT_S)
    unread = {m.node.label: answers[m.node.label].value or [] for m in written if m.node.label in answers}
    yield from check_storage(facts, unread, wanted)
    yield check_clocks({label: _both(before[label].ahead, answer.ahead) for label, answer in answers.items()})


def _all_reduce(there: Sequence[Member], facts: Mapping[str, NodeFacts], wanted: Wanted) -> Iterator[Check]:
    """Only nodes that can hold a worker take part: a head without slots has no ranks, and perhaps no device."""
    on_gpu = any(m.resources.get("GPU") for m in there) and (wanted.resources or {"GPU": 1}).get("GPU", 0) > 0
    kind, backend = ("GPU", "nccl") if on_gpu else ("CPU", "gloo")
    group = [member for member in there if member.resources.get(kind)]
    if not group:
        return
    ranks = {member.node_id: rank for rank, member in enumerate(group)}
    first = (group[0].node.address, facts[group[0].node.label].free_port)
    size, num_bytes = len(group), _SUM_BYTES[backend]
    answers = _ask(
        group,
        lambda m: (probe.all_reduce, m.node, ranks[m.node_id], first, size, backend, num_bytes, _SUM_STEP_LIMIT_S),
        _SUM_LIMIT_S,
        num_gpus=_A_GPU if on_gpu else 0,
    )
    said = {m.node.label: _sum_of(answers.get(m.node.label)) for m in group}
    yield check_all_reduce(said, backend, num_bytes, _SUM_LIMIT_S)


def _sum_of(answer: Answer | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    return answer.value or {"problem": answer.problem}


def _wandb(there: Sequence[Member], wanted: Wanted) -> Iterator[Check]:
    """Asks the driver's node, where the coordinator lives."""
    here = [member for member in there if member.is_here]
    for answer in _ask(here, lambda _: (probe.ask_wandb, wanted.wandb), _LOOK_LIMIT_S).values():
        if answer.value:
            yield check_wandb(**answer.value)


def _failures(group: Sequence[Member], answers: Mapping[str, Answer], during: str, limit_s: float) -> Iterator[Check]:
    yield from check_answers([m.node.label for m in group if m.node.label not in answers], during, limit_s)
    for label, answer in answers.items():
        if answer.problem is not None:
            hint = "see the log of Ray on this node (/tmp/ray/session_latest/logs)"
            yield Check("answers", False, f"{label}: {answer.problem} ({during})", hint)


def _others(member: Member, group: Sequence[Member]) -> list[NodeRef]:
    """The nodes that this one looks at: the next ones in a ring, so that each is also looked at by as many."""
    order = sorted(other.node_id for other in group if other.node_id != member.node_id)
    start = bisect.bisect(order, member.node_id)
    chosen = set((order[start:] + order[:start])[:_MOST_OTHERS])
    return [other.node for other in group if other.node_id in chosen]


def _ask(
    group: Sequence[Member], errand: Callable[[Member], tuple[Any, ...]], limit_s: float, num_gpus: float = 0
) -> dict[str, Answer]:
    """Calls a function on every node at once; returns the answers that come within the limit, by label."""
    run = ray.remote(num_cpus=0, max_retries=0)(_run)
    asked = {}
    for member in group:
        place = NodeAffinitySchedulingStrategy(member.node_id, soft=False)
        options = run.options(scheduling_strategy=place, num_gpus=num_gpus)
        asked[options.remote(*errand(member))] = (member.node.label, time.time())
    answers: dict[str, Answer] = {}
    deadline = time.monotonic() + limit_s
    while asked and (left_s := deadline - time.monotonic()) > 0:
        for reference in ray.wait(list(asked), timeout=left_s)[0]:
            label, sent = asked.pop(reference)
            answers[label] = _answer(reference, sent)
    for reference in asked:
        ray.cancel(reference, force=True)
    return answers


def _run(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Runs on the node; its clock is read in between what the asker knows of its own."""
    result = function(*arguments)
    return time.time(), result


def _answer(reference: Any, sent: float) -> Answer:
    try:
        clock, value = ray.get(reference)
    except Exception as error:  # whatever a broken installation raises there
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return Answer(None, lines[-1].strip()[:300], (float("-inf"), float("inf")))
    return Answer(value, None, (clock - time.time(), clock - sent))


def _both(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(one[0], other[0]), min(one[1], other[1])

"""Judges the facts of a cluster before a run starts there. Pure; `probe` and `ask_nodes` find the facts.

Each subject has one check, and each check one line: it names the faulty nodes (a few if there are many) and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dist_ft.machine import worker_resources, workers_on
from dist_ft.orchestrate.health.facts import Check, NodeFacts, Requirements, SumResult, WandbFacts
from dist_ft.orchestrate.health.this_machine import MIN_DISK_BYTES, MIN_SHM_BYTES
from dist_ft.printable import format_bytes

MAX_SKEW_S = 2.0
_MIN_TEMP_BYTES = 512 << 20  # for Ray's logs; Ray spills nothing, because weights and data do not pass through it
_NUM_NAMED = 5
_SLOW_BYTES_PER_S = 0.1e9  # the speed of a 1 Gbit/s cable; anything slower is probably the wrong interface


def check_workers(nodes: Sequence[Mapping[str, float]], wanted: Requirements) -> Check:
    """Compare the workers that fit on the nodes with the fewest workers that the run starts with."""
    each = worker_resources(wanted.resources, has_gpu=any(node.get("GPU") for node in nodes))
    room = sum(workers_on(node, each) or 0 for node in nodes)
    shown = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
    hint = "" if room >= wanted.num_workers else "add machines, or lower cluster.num_workers or resources_per_worker"
    detail = f"room for {room} of {shown}, the run starts with {wanted.num_workers}"
    return Check("workers", not hint, detail, hint)


def check_versions(here: Mapping[str, str | None], found: Mapping[str, Mapping[str, str | None] | None]) -> Check:
    """Compare the versions on every node with those here; None stands for a node that did not answer."""
    problems = []
    for node, theirs in found.items():
        wrong = [
            f"{key} {theirs.get(key)}, here {here[key]}" for key in here if theirs and theirs.get(key) != here[key]
        ]
        if wrong or theirs is None:
            problems.append(f"{node}: {', '.join(wrong) or 'no answer'}")
    if problems:
        return Check("versions", False, _few(problems), "install the same versions on every machine, or use one image")
    return Check("versions", True, f"{', '.join(f'{k} {v}' for k, v in here.items() if v)} on every node")


def check_answers(silent: Sequence[str], during: str, limit_s: float) -> list[Check]:
    """Name the nodes that did not answer in time."""
    if not silent:
        return []
    hint = "log in there: a disk or network mount that hangs, or no CPU left; `ray stop` on it takes it out"
    return [Check("answers", False, f"{_few(silent)}: no answer within {limit_s:g} s ({during})", hint)]


def check_nodes(nodes: Mapping[str, NodeFacts], gpus: Mapping[str, float]) -> list[Check]:
    """Judge each node by itself, and its connections to the others.

    Args:
        nodes: Facts by label.
        gpus: Number of GPUs of each node, as Ray counts them.
    """
    return [
        _devices(nodes, gpus),
        _shared_memory(nodes),
        _space(
            "temp directory",
            {node: facts.temp_free_bytes for node, facts in nodes.items()},
            _MIN_TEMP_BYTES,
            _few(sorted({facts.temp_dir for facts in nodes.values()})),
            "free some, or start Ray with --temp-dir elsewhere",
        ),
        *_network(nodes),
    ]


def check_storage(
    nodes: Mapping[str, NodeFacts], unread: Mapping[str, Sequence[str]], wanted: Requirements
) -> list[Check]:
    """Judge `run.output_dir` as seen from every node.

    Args:
        nodes: Facts by label.
        unread: For each node, the other nodes whose files it did not find.
        wanted: Requirements of the run.
    """
    if wanted.output_dir is None:
        return [Check("storage", True, "not looked at; name a CONFIG to have its run.output_dir checked")]
    where = wanted.output_dir
    nearest = Counter(facts.nearest_dir for facts in nodes.values())
    usual = nearest.most_common(1)[0][0] if nearest else None
    absent = [
        f"{node}: the nearest that exists is {facts.nearest_dir}, elsewhere {usual}"
        for node, facts in nodes.items()
        if facts.nearest_dir != usual
    ]
    failed = [f"{node}: {facts.storage_problem}" for node, facts in nodes.items() if facts.storage_problem]
    blind = [f"{node} does not see files of {_few(others)}" for node, others in unread.items() if others]
    num_first = sum(facts.is_first for facts in nodes.values())
    checks = []
    if absent or failed:
        hint = "mount it on every machine, writable for the user who runs Ray (a file system with hard links)"
        checks.append(Check("output directory", False, f"{where}: {_few([*absent, *failed])}", hint))
    else:
        checks.append(Check("output directory", True, f"{where}: writable from every node"))
        if blind:
            hint = "name a directory that all machines share"
            checks.append(Check("shared files", False, f"{where}: {_few(blind)}", hint))
        elif num_first != 1:
            hint = "use a file system with hard links that all machines agree on (NFS, Lustre, CephFS)"
            checks.append(Check("exclusive creation", False, f"{where}: {num_first} nodes created the same file", hint))
        else:
            checks.append(Check("shared files", True, "what a node writes the others read; of two creators one wins"))
    free = {node: facts.output_free_bytes for node, facts in nodes.items() if facts.output_free_bytes is not None}
    if free:
        checks.append(_space("disk", free, MIN_DISK_BYTES, where, "free some, or set run.output_dir elsewhere"))
    return checks


def check_clocks(offsets: Mapping[str, tuple[float, float]]) -> Check:
    """Compare the clocks of the nodes with the clock here.

    Args:
        offsets: The least and the most that each may be ahead, in seconds.
    """
    # Count only the certain part: a message that took a second leaves a second of doubt.
    sure = {node: max(low, 0.0) + min(high, 0.0) for node, (low, high) in offsets.items()}
    wrong = [f"{n} {abs(s):.1f} s {'ahead' if s > 0 else 'behind'}" for n, s in sure.items() if abs(s) > MAX_SKEW_S]
    if wrong:
        return Check(
            "clocks", False, _few(wrong), "let NTP (chrony, systemd-timesyncd) set the clock of these machines"
        )
    return Check("clocks", True, f"within {MAX_SKEW_S:g} s of one another")


def check_all_reduce(answers: Mapping[str, SumResult | None], backend: str, num_bytes: int, limit_s: float) -> Check:
    """Judge the all-reduce over all nodes.

    Args:
        answers: The answer of each node; None if there was none.
        backend: gloo or nccl.
        num_bytes: Size of the summed tensor.
        limit_s: Longest wait for an answer.
    """
    problems = [
        f"{node}: {answer.problem if answer else f'no answer within {limit_s:g} s'}"
        for node, answer in answers.items()
        if answer is None or answer.problem is not None
    ]
    if problems:
        hint = "open all TCP ports between the machines; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME before ray start"
        return Check("all-reduce", False, f"{backend}: {_few(problems)}", hint)
    speed = min(answer.bytes_per_s for answer in answers.values() if answer)
    if len(answers) == 1:
        return Check("all-reduce", True, f"{backend} works; one node, so there is no network to measure")
    detail = f"{backend} over {len(answers)} nodes: {speed / 1e9:.2f} GB/s with {format_bytes(num_bytes)}"
    hint = "" if speed >= _SLOW_BYTES_PER_S else "that is slow: is it the interface that you mean?"
    return Check("all-reduce", True, detail, hint)


def check_wandb(facts: WandbFacts) -> Check:
    """Judge where numbers for W&B go. A server out of reach never stops a run, so it is only reported."""
    if facts.problem is not None:
        return Check(
            "W&B", False, facts.problem, "set WANDB_API_KEY before ray start on the head, or monitor.wandb=offline"
        )
    if facts.mode != "online":
        return Check("W&B", True, facts.mode)
    hint = "" if facts.is_reached else "let the head out, set HTTPS_PROXY there, or monitor.wandb=offline"
    return Check("W&B", True, f"online, {facts.host} {'answers' if facts.is_reached else 'does not answer'}", hint)


def _devices(nodes: Mapping[str, NodeFacts], gpus: Mapping[str, float]) -> Check:
    if not any(gpus.values()) and not any(facts.gpus for facts in nodes.values()):
        return Check("devices", True, "no GPUs; CPU runs")
    missing = [f"{n}: Ray has {gpus[n]:g} GPUs, /dev has {f.gpus}" for n, f in nodes.items() if gpus[n] > f.gpus]
    if missing:
        return Check("devices", False, _few(missing), "restart Ray there; give the container its devices")
    kinds = Counter((f.gpus, f.driver) for f in nodes.values() if f.gpus)
    shown = ", ".join(f"{count} nodes of {num} GPUs (driver {driver})" for (num, driver), count in kinds.items())
    unused = [node for node, facts in nodes.items() if facts.gpus and not gpus[node]]
    differ = "drivers differ: if NCCL fails, look here first" if len({driver for _, driver in kinds}) > 1 else ""
    return Check("devices", True, shown, f"Ray uses no GPU of {_few(unused)}" if unused else differ)


def _shared_memory(nodes: Mapping[str, NodeFacts]) -> Check:
    sizes = {node: facts.shm_bytes for node, facts in nodes.items() if facts.shm_bytes is not None}
    small = [f"{node}: {format_bytes(size)}" for node, size in sizes.items() if size < MIN_SHM_BYTES]
    if small:
        hint = f"{format_bytes(MIN_SHM_BYTES)} at least: docker run --shm-size, or a volume in memory at /dev/shm"
        return Check("shared memory", False, _few(small), hint)
    least = f"at least {format_bytes(min(sizes.values()))} on every node" if sizes else "none of its own"
    return Check("shared memory", True, least)


def _space(name: str, free: Mapping[str, int], wanted: int, where: str, hint: str) -> Check:
    full = [f"{node}: {format_bytes(count)}" for node, count in free.items() if count < wanted]
    if full:
        return Check(name, False, f"{where}: {_few(full)} free, wanted {format_bytes(wanted)}", hint)
    return Check(name, True, f"at least {format_bytes(min(free.values()))} free in {where}")


def _network(nodes: Mapping[str, NodeFacts]) -> list[Check]:
    """Judge the interface, the names and the connections of each node."""
    without = [node for node, facts in nodes.items() if facts.interface is None]
    if without:
        hint = "start Ray there with --node-ip-address, an address that the machine itself has"
        interfaces = Check("interfaces", False, f"{_few(without)}: no interface has this address", hint)
    else:
        used = Counter(facts.interface for facts in nodes.values())
        interfaces = Check("interfaces", True, ", ".join(f"{name} on {count} nodes" for name, count in used.items()))
    lost = [f"{node} ({facts.host_name})" for node, facts in nodes.items() if not facts.knows_itself]
    if lost:
        hint = "add the machine's own name to its /etc/hosts"
        names = Check("names", False, f"{_few(lost)} cannot resolve its own name", hint)
    else:
        unknown = sorted({name for facts in nodes.values() for name in facts.unknown})
        others = f"; {_few(unknown)} not everywhere, which runs do not need" if unknown else ", and the others'"
        names = Check("names", True, f"every node resolves its own{others}")
    cut = [f"{node} → {_few(facts.unreached)}" for node, facts in nodes.items() if facts.unreached]
    if cut:
        hint = "open all TCP ports between the machines"
        return [interfaces, names, Check("network", False, f"no way: {_few(cut)}", hint)]
    return [interfaces, names, Check("network", True, f"every node reaches every other ({len(nodes)})")]


def _few(items: Iterable[str]) -> str:
    named = list(items)
    rest = f" and {len(named) - _NUM_NAMED} more" if len(named) > _NUM_NAMED else ""
    return f"{'; '.join(named[:_NUM_NAMED])}{rest}"

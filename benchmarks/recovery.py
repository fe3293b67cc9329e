#!/usr/bin/env python3
"""Time from SIGKILL to the next new optimizer step: dist-ft against stock Ray Train v2 with stock DeepSpeed.

    python benchmarks/recovery.py [--rounds 3] [--case same-2|same-3|resize|all] [--json FILE]

Both sides train the same tiny Llama in float32 on the same rows in the same micro batches, ZeRO 2 with the fused
AdamW, CPU and gloo, a checkpoint every 10 steps. The losses of all steps are compared, which is how we know that
they do the same work. A new step is one that had not been completed before the kill; the steps between the last
checkpoint and the kill are repeated first and are part of the time.

Cases: `same-N`: SIGKILL of one of N rank processes, on a Ray of its own; the group comes back at the same size.
`resize`: three Ray nodes on loopback with one worker each; the raylet of the last one and everything that it
started is killed at once, and the run goes on with two workers. `resize-1`: the same with two nodes and one left.
Sides alternate, each run has a fresh Ray, one runs at a time.

What is not equal, and in whose favour:
- A rank of dist-ft is a process forked by a server that has imported torch and DeepSpeed; that is the design, and it
  costs the memory of one more process on each node. Stock has no such thing.
- Stock steps carry their own time stamps; those of dist-ft are taken when the row is seen in metrics.jsonl, after two
  more processes and up to 10 ms later. In favour of stock.
- dist-ft also hashes and verifies the checkpoint, fences off the old group, and keeps run.json, ledger and metrics.
  In favour of stock.
- Stock asks a tuned poll of 0.5 s (as dist-ft does), a start limit of 10 s and a monitor of 1 s; its defaults are
  2, 60 and 60 s. In favour of stock.
- On loopback nodes dist-ft gives each rank all cores of "its" machine, Ray gives it one. In favour of stock.
- `group` means: the train function is entered on every worker. In stock the process group exists by then (and torch is
  imported), DeepSpeed and transformers are not; in dist-ft ranks are forked afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAX_STEPS = 60
EVERY_STEPS = 10
"""About a second: stock commits when its controller polls, twice a second."""
KILL_STEP = 24
STEPS_BEHIND = 6
"""Least completed steps behind the checkpoint at the kill."""
STAGE = 2
PHASES = ("noticed", "group", "loaded", "new step")
_LIMIT_S = 240.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Case:
    """What is done to a run.

    Attributes:
        num_workers: Workers before the fault.
        num_left: Workers after it.
        on_nodes: One worker a Ray node, and a node is lost; otherwise a rank is killed.
    """

    num_workers: int
    num_left: int
    on_nodes: bool = False


CASES = {
    "same-2": Case(2, 2),
    "same-3": Case(3, 3),
    "resize": Case(3, 2, on_nodes=True),
    "resize-1": Case(2, 1, on_nodes=True),
}
ALL = ("same-2", "same-3", "resize")

_HOLD_NODES = """
import os, sys
from ray.cluster_utils import Cluster
size = dict(num_cpus=1, object_store_memory=80_000_000)
cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
nodes = [cluster.add_node(**size) for _ in range(int(sys.argv[1]) - 1)]
cluster.wait_for_nodes()
print(cluster.address, nodes[-1].all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Step:
    """A completed optimizer step.

    Attributes:
        step: Its number.
        loss: Mean over the trained tokens of the global batch.
        time: Of its completion.
        group: What tells the groups that were formed one after the other apart.
    """

    step: int
    loss: float
    time: float
    group: int


class Lines:
    """A JSONL file that grows; each line with the time at which it was seen here."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, those that came since the last call included."""
        if not self._path.exists():
            return self.rows
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        now = time.time()
        self.rows += [{"seen": now, **json.loads(line)} for line in whole.splitlines()]
        return self.rows


class DistFt:
    """`dist-ft train`, watched through its run directory."""

    name = "dist-ft"

    def __init__(self, work: Work, case: Case, directory: Path, address: str | None) -> None:
        self.log = directory / "output.log"
        self._run_dir = directory / "run"
        self._metrics = Lines(self._run_dir / "metrics.jsonl")
        self._ledger = Lines(self._run_dir / "ledger.jsonl")
        settings = [f"run.output_dir={directory}", "run.name=run", *work.overrides,
                    f"cluster.num_workers={[case.num_left if case.on_nodes else 1, case.num_workers]}",
                    *([] if address is None else [f"cluster.address={address}"])]  # fmt: skip
        command = [str(Path(sys.executable).parent / "dist-ft"), "train", str(work.config), "--json", *settings]
        self.process = _start(command, self.log)

    def steps(self) -> list[Step]:
        """Return every completed step, repeated ones included, in the order of time."""
        return [Step(row["step"], row["loss"], row["seen"], row["attempt"]) for row in self._metrics.read()]

    def committed(self) -> int:
        """Return the newest committed step."""
        return max((row["step"] for row in self._ledger.read() if row["event"] == "commit"), default=0)

    def rank_pid(self, rank: int) -> int:
        """Return the pid of the process that trains as this rank."""
        workers = json.loads((self._run_dir / "run.json").read_text())["workers"]
        return next(int(worker["pid"]) for worker in workers if worker["rank"] == rank)

    def moments(self, fault: float, num_workers: int) -> dict[str, float]:
        """Return the times of what followed the fault; `num_workers` is the size of the new group."""
        ledger = [row for row in self._ledger.read() if row["time"] >= fault]
        attempts = [row for row in ledger if row["event"] == "attempt" and row["world_size"] == num_workers]
        return {
            "noticed": _first(ledger, "rank_failed", "recovering"),
            "group": attempts[-1]["time"],
            "loaded": [row["time"] for row in ledger if row["event"] == "loaded"][-1],
            "decided": _first(ledger, "recovering"),
        }

    def num_attempts(self) -> int:
        """Return how often a group was formed."""
        return sum(row["event"] == "attempt" for row in self._ledger.read())


class Stock:
    """`recovery_stock.py`, watched through its file of events."""

    name = "stock"

    def __init__(self, work: Work, case: Case, directory: Path, address: str | None) -> None:
        self.log = directory / "output.log"
        self._events = Lines(directory / "events.jsonl")
        setting = {
            **work.stock,
            "scratch": str(directory),
            "events": str(directory / "events.jsonl"),
            "sizes": [case.num_left if case.on_nodes else 1, case.num_workers],
            "address": address,
        }
        (directory / "setting.json").write_text(json.dumps(setting))
        script = Path(__file__).with_name("recovery_stock.py")
        self.process = _start([sys.executable, str(script), str(directory / "setting.json")], self.log)

    def steps(self) -> list[Step]:
        """See `DistFt`."""
        return [Step(row["step"], row["loss"], row["time"], row["pid"]) for row in self._named("step")]

    def committed(self) -> int:
        """See `DistFt`."""
        return max((row["step"] for row in self._named("commit")), default=0)

    def rank_pid(self, rank: int) -> int:
        """See `DistFt`."""
        return next(int(row["pid"]) for row in reversed(self._named("entered")) if row["rank"] == rank)

    def moments(self, fault: float, num_workers: int) -> dict[str, float]:
        """See `DistFt`."""
        rows = [row for row in self._events.read() if row["time"] >= fault]
        last = {
            event: max(r["time"] for r in rows if r["event"] == event and r["world_size"] == num_workers)
            for event in ("entered", "imported", "built", "loaded")
        }
        found = {"noticed": _first(rows, "noticed"), "group": last.pop("entered"), **last}
        converted = [row["time"] for row in rows if row["event"] == "converted"]
        return found | ({"converted": converted[-1]} if converted else {})

    def num_attempts(self) -> int:
        """See `DistFt`."""
        return sum(row["rank"] == 0 for row in self._named("entered"))

    def _named(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self._events.read() if row["event"] == event]


@dataclass(frozen=True)
class Work:
    """What both sides train.

    Attributes:
        config: Config file of dist-ft.
        overrides: Its overrides.
        stock: Setting of the peer, as far as it is the same for all cases.
    """

    config: Path
    overrides: list[str]
    stock: dict[str, Any]


def make_work(directory: Path) -> Work:
    """Make model and data once, in a process of its own: this one stays small."""
    config = ROOT / "configs" / "smoke" / "full.yaml"
    overrides = [
        f"train.max_steps={MAX_STEPS}", f"checkpoint.every_steps={EVERY_STEPS}", f"zero.stage={STAGE}",
        "schedule.kind=constant", "schedule.warmup_ratio=0.0", "data.eval=null", "eval.metrics=[]",
        "monitor.wandb=disabled",
    ]  # fmt: skip
    command = [sys.executable, __file__, "--prepare", str(directory), str(config), *overrides]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if made.returncode != 0:
        sys.exit(made.stderr)
    stock = {
        **json.loads(made.stdout.splitlines()[-1]), "max_steps": MAX_STEPS, "every_steps": EVERY_STEPS, "stage": STAGE
    }  # fmt: skip
    return Work(config, overrides, stock)


def prepare(directory: Path, path: Path, overrides: list[str]) -> dict[str, Any]:
    """Write the micro batches of every rank at every world size, as dist-ft would make them."""
    import numpy as np

    from dist_ft.config import load_config
    from dist_ft.config.data_sections import LoaderConfig
    from dist_ft.data.stream.cache import open_split
    from dist_ft.data.stream.loader import RankLayout, TrainLoader, build_order
    from dist_ft.jobs.prepare import prepare
    from dist_ft.model.base import model_dir

    config = load_config(path, overrides)
    inputs = prepare(config).inputs
    shards = [open_split(split, LoaderConfig()) for split in inputs.splits]
    order = build_order(shards, config.data, config.run.seed)
    micro, rows = config.train.micro_batch_size, config.train.global_batch_size
    for size in range(1, max(case.num_workers for case in CASES.values()) + 1):
        for rank in range(size):
            loader = TrainLoader(order, shards, RankLayout(rank, size, micro), rows, inputs.num_positions)
            steps = [loader.step(step) for step in range(MAX_STEPS)]
            arrays: dict[str, Any] = {
                f"{step}-{index}": np.stack([one.input_ids, one.targets, one.position_ids])
                for step, batch in enumerate(steps)
                for index, one in enumerate(batch.micro_batches)
            }
            np.savez(
                directory / f"{size}-{rank}.npz",
                num_passes=np.array(len(steps[0].micro_batches)),
                num_trained=np.array([batch.totals.num_trained_tokens for batch in steps]),
                **arrays,
            )
    return {
        "model": str(model_dir(config)),
        "batches": str(directory),
        "micro_batch_size": micro,
        "lr": config.optimizer.lr,
        "weight_decay": config.optimizer.weight_decay,
        "max_grad_norm": config.optimizer.max_grad_norm,
    }


def measure(system: type[DistFt] | type[Stock], work: Work, case: Case) -> dict[str, Any]:
    """Run one side, disturb it, let it end, and return the timeline in seconds after the fault."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dist-ft-bench-") as name, contextlib.ExitStack() as stack:
        address, raylet = stack.enter_context(_nodes(case.num_workers)) if case.on_nodes else (None, 0)
        run = system(work, case, Path(name), address)
        stack.callback(_end, run.process)
        _wait(run, lambda: _is_due(run), "the step to kill at")
        if case.on_nodes:
            doomed = _descendants(raylet)
        else:
            doomed = [run.rank_pid(case.num_workers - 1)]
        fault = time.time()
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        new = _wait(run, lambda: _first_new(run.steps()), "a new step")
        _wait(run, lambda: run.process.poll() is not None, "the end", may_end=True)
        if run.process.returncode != 0:
            sys.exit(f"{run.name} ended with {run.process.returncode}:\n{_tail(run.log)}")
        steps = run.steps()
        moments = {**run.moments(fault, case.num_left), "new step": new.time}
        return {
            "system": system.name,
            "seconds": {key: round(at - fault, 3) for key, at in moments.items()},
            "repeated_steps": sum(one.group == new.group and one.step < new.step for one in steps),
            "attempts": run.num_attempts(),
            "load_before": round(load, 2),
            "losses": [loss for _, loss in sorted({one.step: one.loss for one in steps}.items())],
        }


def _is_due(run: DistFt | Stock) -> bool:
    """Whether the run is some steps behind a checkpoint that is committed: both sides have as much to repeat."""
    step = max((one.step for one in run.steps()), default=0)
    return step >= KILL_STEP and step % EVERY_STEPS >= STEPS_BEHIND and run.committed() == step - step % EVERY_STEPS


def _first_new(steps: list[Step]) -> Step | None:
    """Return the first step of a later group that the first group had not completed."""
    done = max((one.step for one in steps if one.group == steps[0].group), default=0)
    return next((one for one in steps if one.group != steps[0].group and one.step > done), None)


def _wait(run: DistFt | Stock, condition: Callable[[], Any], what: str, may_end: bool = False) -> Any:
    deadline = time.monotonic() + _LIMIT_S
    while not (found := condition()):
        if run.process.poll() is not None and not may_end and not condition():
            sys.exit(f"{run.name} ended with {run.process.returncode} before {what}:\n{_tail(run.log)}")
        if time.monotonic() > deadline:
            sys.exit(f"{run.name}: {what} did not come within {_LIMIT_S:.0f} s:\n{_tail(run.log)}")
        time.sleep(_POLL_S)
    return found


@contextlib.contextmanager
def _nodes(count: int) -> Iterator[tuple[str, int]]:
    """Give the address of a Ray of several nodes on loopback, and the pid of the last one's raylet."""
    command = [sys.executable, "-c", _HOLD_NODES, str(count)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=_environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    try:
        address, pid = process.stdout.readline().split()
        yield address, int(pid)
    finally:
        process.stdin.close()
        process.wait(60)


def _descendants(root: int) -> list[int]:
    """Return a process and all that it has started."""
    parent: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent[int(path.parent.name)] = int(path.read_bytes().rsplit(b")", 1)[1].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, its_parent in parent.items() if its_parent == pid]
    return found


def _start(command: list[str], path: Path) -> subprocess.Popen[bytes]:
    with path.open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """Return the caller's, without what would slow down imports; and a Ray of ours lets nobody else in."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}


_TOKEN = secrets.token_hex(32)


def _first(rows: list[dict[str, Any]], *events: str) -> float:
    return min(float(row["time"]) for row in rows if row["event"] in events)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-40:])


def summarise(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians by side, the ratio of the totals, and how far the losses are apart."""
    sides = {}
    for side in (DistFt.name, Stock.name):
        mine = [sample for sample in samples if sample["system"] == side]
        keys = mine[0]["seconds"]
        sides[side] = {key: round(statistics.median(s["seconds"][key] for s in mine), 2) for key in keys}
        sides[side]["worst"] = max(s["seconds"]["new step"] for s in mine)
    reference = samples[0]["losses"]
    apart = max(
        abs(a - b) / abs(b) for sample in samples for a, b in zip(sample["losses"], reference, strict=True)
    )  # fmt: skip
    ratio = sides[Stock.name]["new step"] / sides[DistFt.name]["new step"]
    return {"case": name, "median_s": sides, "ratio": round(ratio, 2), "losses_apart": apart, "samples": samples}


def show(results: list[dict[str, Any]]) -> None:
    """Print the table: medians of seconds after the kill."""
    print("\n  case      side     " + "".join(f"{phase:>10}" for phase in PHASES) + "     worst     ratio   repeated")
    for result in results:
        for side, median in result["median_s"].items():
            repeated = [sample["repeated_steps"] for sample in result["samples"] if sample["system"] == side]
            shown = "".join(f"{median[phase]:>10.2f}" for phase in (*PHASES, "worst"))
            ratio = f"{result['ratio']:>9.2f}x" if side == Stock.name else " " * 10
            print(f"  {result['case']:9} {side:8} {shown}{ratio}   {repeated}")
            extra = {key: value for key, value in median.items() if key not in (*PHASES, "worst")}
            print(f"  {'':18} also: {', '.join(f'{key} {value:.2f}' for key, value in extra.items())}")
        print(f"  {'':18} losses of all steps within {result['losses_apart']:.1e} of each other")


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--side", choices=[DistFt.name, Stock.name], help="one side only, to look at its samples")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    results = []
    sides: list[type[DistFt] | type[Stock]] = [DistFt, Stock]
    with tempfile.TemporaryDirectory(prefix="dist-ft-bench-") as directory:
        work = make_work(Path(directory))
        for name in ALL if options.case == "all" else (options.case,):
            samples = []
            for number in range(options.rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    if options.side in (None, side.name):
                        sample = measure(side, work, CASES[name])
                        shown = {key: value for key, value in sample.items() if key != "losses"}
                        print(json.dumps({"case": name, **shown}), flush=True)
                        samples.append(sample)
            if options.side is None:
                results.append(summarise(name, samples))
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        print(json.dumps(prepare(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
    else:
        main()

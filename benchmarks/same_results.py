#!/usr/bin/env python3
"""Does a change leave every result alone? Runs two checkouts over a table of shapes and compares them bit for bit.

    git worktree add /tmp/start COMMIT
    python benchmarks/same_results.py /tmp/start [--steps 6] [--only lora] [--json FILE]

Both sides run `dist-ft train` of the tiny model with the same packages on this machine, one run at a time: full and
LoRA, ZeRO 0 to 3, one and two workers, packed and not. Compared are, of every step, loss, gradient norm, learning
rate, position and digest; the hashes of the last checkpoint's slices (weights and optimizer state); the bytes of the
exported weights; the keys of the token shards; and the names in manifest, run.json and metrics rows that the first
checkout writes, all of which the second must write, too. No number of one CPU is kept in the repository.

Exit code 0 when all is equal, 1 with every difference. Some 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
COMPARED = ("loss", "grad_norm", "lr", "epoch", "position", "trained_tokens", "tokens", "digest")
MOVED = {"run.wandb_id"}
"""Names that the second checkout writes elsewhere on purpose: the ids of all sinks stand in `run.sink_ids`."""
METHODS = {
    "full": "method={kind: full}",
    "lora": "method={kind: lora, r: 4, lora_alpha: 8, lora_dropout: 0.1}",
}


@dataclass(frozen=True)
class Shape:
    """How a run is laid out."""

    method: str
    stage: int
    num_workers: int
    packing: bool

    def __str__(self) -> str:
        packing = "packed" if self.packing else "unpacked"
        return f"{self.method} zero-{self.stage} x{self.num_workers} {packing}"


@dataclass
class Outcome:
    """What a run left that must not move."""

    steps: dict[int, dict[str, Any]]
    slices: list[str]
    export: dict[str, str]
    shards: list[str]
    names: set[str] = field(default_factory=set)


def run(checkout: Path, shape: Shape, num_steps: int, scratch: Path) -> Outcome:
    """Trains one shape with one checkout's sources in an own cache and an own run directory."""
    config = HERE / "configs" / "smoke" / "full.yaml"
    cache = scratch / "cache"
    command = [
        str(Path(sys.executable).parent / "dist-ft"), "train", str(config), "--json",
        f"run.output_dir={scratch}", "run.name=same", METHODS[shape.method],
        f"data.packing={str(shape.packing).lower()}", f"data.cache_dir={cache}", "eval.metrics=[]",
        f"train.max_steps={num_steps}", "train.global_batch_size=6", f"zero.stage={shape.stage}",
        f"cluster.num_workers={shape.num_workers}", f"checkpoint.every_steps={num_steps}", "monitor.wandb=disabled",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "XDG_CACHE_HOME": str(scratch / "user-cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=scratch)
    if done.returncode != 0:
        raise SystemExit(f"{checkout}: {shape} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return _outcome(scratch / "same", cache)


def differences(before: Outcome, after: Outcome) -> Iterator[str]:
    """Yield what is not equal."""
    if sorted(before.steps) != sorted(after.steps):
        yield f"steps {sorted(before.steps)} and {sorted(after.steps)}"
    for step in sorted(before.steps.keys() & after.steps.keys()):
        old, new = before.steps[step], after.steps[step]
        yield from (f"step {step}: {key} {old[key]!r} and {new[key]!r}" for key in COMPARED if old[key] != new[key])
    for what in ("slices", "export", "shards"):
        if getattr(before, what) != getattr(after, what):
            yield f"{what}: {getattr(before, what)} and {getattr(after, what)}"
    if missing := before.names - after.names - MOVED:
        yield f"no longer written: {sorted(missing)}"


def _outcome(run_dir: Path, cache: Path) -> Outcome:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    manifest_path = sorted(run_dir.glob("checkpoints/*/manifest.json"))[-1]
    manifest = json.loads(manifest_path.read_text())
    export = next(run_dir.glob("exports/step-*"))
    names = {f"manifest.{key}" for key in manifest} | {f"metrics.{key}" for key in rows[-1]}
    return Outcome(
        steps={row["step"]: row for row in rows},
        slices=[_hash(path) for path in sorted(manifest_path.parent.glob("slices-*"))],
        export={path.name: _hash(path) for path in sorted(export.glob("*.safetensors"))},
        shards=sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*.arrow")),
        names=names | {f"run.{key}" for key in json.loads((run_dir / "run.json").read_text())},
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    table = [Shape(*row) for row in product(METHODS, range(4), (1, 2), (False, True))]
    found: dict[str, list[str]] = {}
    for shape in (shape for shape in table if arguments.only in str(shape)):
        outcomes = []
        for checkout in (arguments.before.resolve(), HERE):
            with tempfile.TemporaryDirectory(prefix="dist-ft-same-") as scratch:
                outcomes.append(run(checkout, shape, arguments.steps, Path(scratch)))
        found[str(shape)] = list(differences(*outcomes))
        print(f"{shape!s:28} {'equal' if not found[str(shape)] else 'DIFFERENT'}", flush=True)
        print("".join(f"    {line}\n" for line in found[str(shape)]), end="", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    num_bad = sum(map(bool, found.values()))
    print(f"{len(found) - num_bad} of {len(found)} shapes equal")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()

"""Attempts of a run on the ranks of `tests.helpers.ranks`: opened, committed and read by the test itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, check_coverage, index_pieces, map_slices
from dist_ft.config import Config, with_commit
from dist_ft.coordinator.commit import Staging, commit
from dist_ft.messages import Staged
from dist_ft.metric_rows import EvalRow
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.run_inputs import RunInputs
from dist_ft.slices import ParamInfo, SliceKey, WrittenFile
from dist_ft.storage.store import LocalStore
from dist_ft.typed_json import from_json
from tests.helpers.ranks import RankServer

BODIES = "tests.helpers.rank_bodies"

Floats = npt.NDArray[np.float32]
State = dict[tuple[str, str], Floats]
"""(parameter, kind) → all elements, flattened."""


@dataclass
class Attempt:
    """A finished attempt.

    Attributes:
        run_dir: The run directory.
        number: Its number.
        rows: Rows of metrics, as rank 0 sent them.
        evals: Rows of evaluations.
        outcome: completed or stopped.
        manifests: What it committed, by step.
        results: What the body returned on each rank.
    """

    run_dir: Path
    number: int
    rows: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    outcome: str
    manifests: dict[int, Manifest]
    results: list[Any]

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step."""
        return {row["step"]: row["loss"] for row in self.rows}

    @property
    def digests(self) -> dict[int, str]:
        """Sequence digest of each step."""
        return {row["step"]: row["digest"] for row in self.rows}

    def state(self, step: int | None = None) -> State:
        """State in one of its checkpoints, by default the last."""
        return read_state(self.run_dir, self.manifests[max(self.manifests) if step is None else step])

    def weights(self) -> dict[str, Floats]:
        """Masters at the end."""
        return weights_of(self.state())


def prepare(ranks: RankServer, config: Config) -> dict[str, Any]:
    """Prepares the data of a run; returns what the task does."""
    arguments = {"config": config.model_dump(mode="json")}
    (prepared,) = ranks.run(1, f"{BODIES}:prepare", arguments, in_group=False)
    return dict(prepared)


def attempt_spec(
    config: Config,
    prepared: dict[str, Any],
    number: int,
    start: Manifest | None,
    evaluations: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns an `AttemptSpec` as a dict."""
    inputs = RunInputs.from_dict(prepared)
    return AttemptSpec(
        run_id=config.run.name,
        attempt=number,
        run_dir=str(run_path(config)),
        config=with_commit(config, inputs.commit),
        inputs=inputs,
        start_checkpoint=f"{start.directory}/{MANIFEST}" if start else None,
        evaluations=tuple(EvalRow.from_dict(row) for row in evaluations or []),
    ).to_dict()


def run_path(config: Config) -> Path:
    """The run directory."""
    return Path(config.run.output_dir) / config.run.name


def train(
    ranks: RankServer,
    config: Config,
    *,
    start: Manifest | None = None,
    prepared: dict[str, Any] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
    body: str = "train",
    timeout_s: float = 120.0,
    **arguments: Any,
) -> Attempt:
    """Runs one attempt at `cluster.num_workers` from a checkpoint of the same run directory, and commits."""
    prepared = prepared or prepare(ranks, config)
    store = LocalStore(run_path(config))
    number = take_attempt(store, start).number
    spec = attempt_spec(config, prepared, number, start, evaluations)
    results = ranks.run(
        config.cluster.max_workers, f"{BODIES}:{body}", {"attempt": spec, **arguments}, timeout_s=timeout_s
    )
    manifests = commit_staged(config, number, results)
    first = results[0]
    return Attempt(run_path(config), number, first["rows"], first["evals"], first["outcome"], manifests, results)


def commit_staged(config: Config, number: int, results: list[dict[str, Any]]) -> dict[int, Manifest]:
    """Commits what the ranks staged, as the coordinator does."""
    found: dict[int, Staging] = {}
    for rank, result in enumerate(results):
        for staged in result["staged"]:
            found.setdefault(staged["step"], Staging()).add(rank, from_json(Staged, staged))
    assert all(staging.is_whole(len(results)) for staging in found.values())
    store = LocalStore(run_path(config))
    return {step: commit(store, config.run.name, number, None, staging) for step, staging in found.items()}


def commit_copy(run_dir: Path, source: Manifest, number: int, stage: int, files: list[dict[str, Any]]) -> Manifest:
    """Commits slices that another shape wrote of the state of `source`."""
    written = tuple(WrittenFile(**file) for file in files)
    manifest = replace(source, attempt=number, zero_stage=stage, world_size=len(files), files=written)
    store = LocalStore(run_dir)
    slices = map_slices(store, manifest.directory, [file.name for file in written])
    check_coverage(manifest.params, slices)
    manifest = replace(manifest, pieces=index_pieces(slices, written))
    assert store.create_exclusive(f"{manifest.directory}/{MANIFEST}", manifest.encode())
    return manifest


def read_state(run_dir: Path, manifest: Manifest) -> State:
    """Reads a checkpoint whole; each element must be there exactly once. Shares no code with the readers in src."""
    return read_files([run_dir / manifest.directory / file.name for file in manifest.files], manifest.params)


def read_files(paths: Iterable[Path], params: Iterable[ParamInfo]) -> State:
    """Puts slice files together."""
    state: State = {}
    counts: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
    for param in params:
        for kind in param.kinds:
            state[param.name, kind] = np.zeros(param.numel, dtype=np.float32)
            counts[param.name, kind] = np.zeros(param.numel, dtype=np.int64)
    for path in paths:
        for text, values in load_file(path).items():
            key = SliceKey.decode(text)
            assert values.dtype == np.float32
            part = slice(key.start, key.start + len(values))
            assert len(state[key.param, key.kind][part]) == len(values), f"{text} is too long"
            state[key.param, key.kind][part] = values
            counts[key.param, key.kind][part] += 1
    wrong = [key for key, count in counts.items() if not (count == 1).all()]
    assert not wrong, f"not stored exactly once: {wrong}"
    return state


def weights_of(state: State) -> dict[str, Floats]:
    """The masters of a state."""
    return {name: values for (name, kind), values in state.items() if kind == "fp32"}


def differing(a: State, b: State) -> list[tuple[str, str]]:
    """Keys whose values are not the same bits."""
    assert a.keys() == b.keys()
    return [key for key in a if a[key].tobytes() != b[key].tobytes()]


def relative_l2(a: dict[str, Floats], b: dict[str, Floats]) -> float:
    """The largest relative distance over all tensors."""
    assert a.keys() == b.keys()
    wide = {name: (a[name].astype(np.float64), b[name].astype(np.float64)) for name in b}
    return max(float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(y)), 1e-12) for x, y in wide.values())

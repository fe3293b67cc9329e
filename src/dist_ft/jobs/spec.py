"""Defines the arguments and the answers of tasks. `orchestrate/driver/tasks.py` runs the tasks.

A task runs in a separate process, so arguments and answers are sent as JSON values; both ends convert them to types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, NamedTuple

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import RunInputs


@dataclass(frozen=True)
class TaskSpec:
    """A call of `dist_ft.jobs.<name>.run(**arguments)` in a process of its own.

    Attributes:
        name: Module in `dist_ft.jobs`.
        arguments: JSON values; `config` among them is the run config, which the task gets as a `Config`.
        needs_device: Whether the task uses a GPU, if the run has any.
    """

    name: str
    arguments: dict[str, Any]
    needs_device: bool = False


class Window(NamedTuple):
    """A window of the shards of one source, in a streamed run."""

    source: int
    number: int


@dataclass(frozen=True)
class ShardJob:
    """A token shard to make, or its scores.

    Attributes:
        take_held_out: Whether the shard belongs to the held-out fraction.
        shard: A `PlannedShard` as JSON values. It is not decoded here, because the driver may pass on 100,000 of them.
        num_bytes: Stored bytes that are read for the shard, approximately.
        window: Window in which a streamed run needs the shard.
        place: Place of the shard in the order of its source.
        score_key: Key of the frozen model that scores the shard as well (`jobs/score.py`); empty for none.
    """

    take_held_out: bool
    shard: dict[str, Any]
    num_bytes: int
    window: Window
    place: int
    score_key: str = ""

    def task(self, config: dict[str, Any], share: float = 1.0) -> TaskSpec:
        """Return the task that makes the shard.

        Args:
            config: The run config as JSON values.
            share: Share of the machine's cores that the task may use to score.
        """
        arguments = {"config": config, "take_held_out": self.take_held_out, "shard": self.shard}
        if not self.score_key:
            return TaskSpec("make_shard", arguments)
        return TaskSpec("score", {**arguments, "score_key": self.score_key, "share": share}, needs_device=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardJob:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**{**data, "window": Window(*data["window"])})


class MadeShard(NamedTuple):
    """A shard of a streamed run that exists already."""

    window: Window
    num_sequences: int


@dataclass(frozen=True)
class StreamedShards:
    """The shards of a run whose data is prepared while training goes on.

    Attributes:
        jobs: Shards to make, in the order in which training needs them.
        made: Shards that exist.
    """

    jobs: tuple[ShardJob, ...]
    made: tuple[MadeShard, ...]


SourceFiles = tuple[tuple[SourceFile, ...], ...]
"""The files of each training source."""


@dataclass(frozen=True)
class MissingShards:
    """The answer of the preparation when other processes should make shards first.

    Attributes:
        jobs: The shards.
        files: Files of the sources.
        commit: Commit of a hub model.
    """

    jobs: tuple[ShardJob, ...]
    files: SourceFiles
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without the secrets of URLs."""
        return {"missing": [asdict(job) for job in self.jobs], "files": encode_files(self.files), "commit": self.commit}


@dataclass(frozen=True)
class Preparation:
    """The answer of the preparation when a run can start on the data.

    Attributes:
        inputs: What the run trains on.
        files: Files of the sources.
        num_made: Shards that were missing.
        to_stream: With `data.preparation=stream`, the shards to make while training goes on.
        to_score: Shards that a frozen model must score before the first step.
    """

    inputs: RunInputs
    files: SourceFiles
    num_made: int
    to_stream: StreamedShards | None
    to_score: tuple[ShardJob, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without the secrets of URLs, including the values of the inputs."""
        return {
            "missing": [],
            **self.inputs.to_dict(),
            "files": encode_files(self.files),
            "num_made": self.num_made,
            "to_stream": asdict(self.to_stream) if self.to_stream else None,
            "to_score": [asdict(job) for job in self.to_score],
        }


def decode_preparation(data: dict[str, Any]) -> Preparation | MissingShards:
    """Return the answer of the task `prepare`."""
    files = tuple(tuple(SourceFile.from_dict(file) for file in source) for source in data["files"])
    if data["missing"]:
        return MissingShards(tuple(map(ShardJob.from_dict, data["missing"])), files, data["commit"])
    to_stream = None
    if streamed := data["to_stream"]:
        made = tuple(MadeShard(Window(*window), num_sequences) for window, num_sequences in streamed["made"])
        to_stream = StreamedShards(tuple(map(ShardJob.from_dict, streamed["jobs"])), made)
    to_score = tuple(map(ShardJob.from_dict, data["to_score"]))
    return Preparation(RunInputs.from_dict(data), files, data["num_made"], to_stream, to_score)


def encode_files(files: SourceFiles) -> list[list[dict[str, Any]]]:
    """Return the files as JSON values, as `sources.json` holds them."""
    return [[file.to_dict() for file in source] for source in files]


@dataclass(frozen=True)
class ExportResult:
    """The answer of the task `export`.

    Attributes:
        export_dir: Directory or URL of the export.
        probe_difference: Largest difference of the probe's logits, relative to the largest logit.
    """

    export_dir: str
    probe_difference: float


def export_task(
    config: Config, run_dir: Run, manifest: Manifest, name: str = "", is_beside_training: bool = False
) -> TaskSpec:
    """Return the task that exports a checkpoint as `export` of the config says.

    Args:
        config: The run config.
        run_dir: The run.
        manifest: The checkpoint.
        name: Folder in the run; empty for `exports/step-…`.
        is_beside_training: Whether training goes on meanwhile, so that the task limits itself.
    """
    arguments = {
        "config": config.model_dump(mode="json"),
        "run_dir": run_dir.address,
        "checkpoint": f"{manifest.directory}/manifest.json",
        "to": run_dir.address_of(name or run_dir.export_name(manifest.step)),
        "merge": config.export.merge,
        "dtype": config.export.dtype,
        "is_beside_training": is_beside_training,
    }
    return TaskSpec("export", arguments)


def evaluate_tasks(
    config: Config, models: Mapping[str, str | None], num_workers: int, num_nodes: int
) -> list[TaskSpec]:
    """Return the tasks that measure generated answers; none if the config asks for no metric.

    Args:
        config: The run config.
        models: See `jobs.evaluate`.
        num_workers: Number of tasks.
        num_nodes: Machines that run the tasks.
    """
    if not config.eval.metrics:
        return []
    shared = {
        "config": config.model_dump(mode="json"),
        "models": dict(models),
        "num_shards": num_workers,
        "num_local": ceil(num_workers / num_nodes),
    }
    return [TaskSpec("evaluate", {**shared, "shard": shard}, needs_device=True) for shard in range(num_workers)]

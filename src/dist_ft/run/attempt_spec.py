"""Defines the specifications that supervisors and ranks get at the start of an attempt.

The coordinator makes an `AttemptSpec`, and Ray carries it to the supervisors as an object. Each supervisor passes a
`RankSpec` to its rank as JSON, because a socket must not be able to run code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dist_ft.checkpoint.interval import PRIOR_S
from dist_ft.config import Config, config_from_dict
from dist_ft.metric_rows import EvalRow
from dist_ft.run.run_inputs import RunInputs
from dist_ft.typed_json import from_json


@dataclass(frozen=True)
class AttemptSpec:
    """Holds what all ranks of an attempt share. The coordinator makes it.

    Attributes:
        run_id: The run.
        attempt: Number of the attempt.
        run_dir: The run directory.
        config: The run config, with the commit of a hub model.
        inputs: What the run trains on.
        start_checkpoint: Manifest path relative to the run directory, or None to start anew.
        skipped_steps: Steps that make no update (`failure.bad_numbers: skip_batch`).
        recent_losses: Losses of the last steps before the start, with which a spike is recognised.
        evaluations: Rows of eval.jsonl up to the start, each step once.
        on_gpu: Whether ranks use CUDA devices.
        mtbf_s: Mean seconds between failures of the run, for `checkpoint.every_steps: auto`.
    """

    run_id: str
    attempt: int
    run_dir: str
    config: Config
    inputs: RunInputs
    start_checkpoint: str | None = None
    skipped_steps: tuple[int, ...] = ()
    recent_losses: tuple[float, ...] = ()
    evaluations: tuple[EvalRow, ...] = ()
    on_gpu: bool = False
    mtbf_s: float = PRIOR_S

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttemptSpec:
        """Inverse of `to_dict`, also after JSON."""
        parsed = {"config": config_from_dict(data["config"]), "inputs": RunInputs.from_dict(data["inputs"])}
        return from_json(cls, {**data, **parsed})


@dataclass(frozen=True)
class RankSpec:
    """Holds what one rank is told at its start.

    Attributes:
        attempt: The part that all ranks share.
        rank: Index in `0..world_size-1`.
        world_size: Number of ranks.
        local_rank: Index on its node.
        node_ip: Address of its node.
        num_threads: Threads for computation.
        env: Environment variables to set first (devices).
        local_world_size: Ranks on its node.
    """

    attempt: AttemptSpec
    rank: int
    world_size: int
    local_rank: int
    node_ip: str
    num_threads: int
    env: dict[str, str] = field(default_factory=dict)
    local_world_size: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {**vars(self), "attempt": self.attempt.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RankSpec:
        """Inverse of `to_dict`, also after JSON."""
        return cls(**{**data, "attempt": AttemptSpec.from_dict(data["attempt"])})

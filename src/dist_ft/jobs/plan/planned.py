"""Defines the values that `dist-ft plan` prints, and the cost of a run. Torch-free, like `report/`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dist_ft.memory import Memory


@dataclass(frozen=True)
class PlannedModel:
    """The model of a run.

    Attributes:
        name: `model.name`.
        num_params: Parameters, those of an adapter included.
        num_trained: Parameters that are trained.
        dtype: `float32` or `bfloat16`.
        layers: Layers.
        hidden: Width of the hidden states.
    """

    name: str
    num_params: int
    num_trained: int
    dtype: str
    layers: int
    hidden: int


@dataclass(frozen=True)
class PlannedData:
    """Totals of the training data. All but the last two are None while some shards are not made yet.

    Attributes:
        rows: Rows used.
        sequences: Sequences after packing.
        tokens: Tokens of all sequences.
        trained_tokens: Tokens whose prediction is trained.
        untrained_rows: Rows that are left out because none of their tokens is trained.
        long_samples: Samples longer than `data.seq_len`.
        bad_rows: Rows that are left out because they cannot be used.
        shards: Token shards.
        eval_sequences: Held-out sequences.
    """

    rows: int | None
    sequences: int | None
    tokens: int | None
    trained_tokens: int | None
    untrained_rows: int | None
    long_samples: int | None
    bad_rows: int | None
    shards: int
    eval_sequences: int


@dataclass(frozen=True)
class MemoryRow:
    """The memory of one worker at a world size and a setting of `zero.stage`."""

    world_size: int
    stage: int
    memory: Memory

    def to_dict(self) -> dict[str, int]:
        """Return JSON values."""
        total = self.memory.total_bytes
        return {"world_size": self.world_size, "stage": self.stage, **asdict(self.memory), "total_bytes": total}


@dataclass(frozen=True)
class SizeRow:
    """Describes a step at a world size.

    Attributes:
        world_size: Workers.
        micro_batch_size: Sequences of a pass.
        micro_steps: Passes of a step.
        padding_share: Share of the computed token places that is padding.
        surplus_slots: Slots of a step without a sequence.
    """

    world_size: int
    micro_batch_size: int
    micro_steps: int
    padding_share: float
    surplus_slots: int


@dataclass(frozen=True)
class PlannedScores:
    """What a frozen model writes about the data.

    Attributes:
        model: The frozen model, as the config names it.
        columns: Names of what it writes.
        num_bytes: Bytes of all scores; None while some shards are not made yet.
        share_of_work: Its forward passes as a share of the arithmetic of the training; None as above.
    """

    model: str
    columns: tuple[str, ...]
    num_bytes: int | None
    share_of_work: float | None


@dataclass(frozen=True)
class Plan:
    """Describes what a run will do and need.

    Attributes:
        run: Name of the run.
        run_dir: Path or URL of the run.
        model: The model.
        method: `method.kind`.
        objective: `objective.kind`.
        scores: What a frozen model writes before the first step, if the objective has one.
        optimizer: Display name of the optimizer.
        state_bytes: Bytes of optimizer state per trained parameter, without its float32 master.
        data: The data.
        steps: Steps of the run.
        positions: Sequences that the run uses.
        global_batch_size: Sequences of a step.
        micro_batch_size: Sequences of a pass, as configured.
        tokens_per_step: Mean over sampled steps.
        zero_stage: ZeRO stage that the run uses.
        zero_note: Why it differs from `zero.stage`, if it does.
        memory: By world size, then stage.
        world_sizes: Steps at each world size.
        warnings: Lines for the user.
    """

    run: str
    run_dir: str
    model: PlannedModel
    method: str
    objective: str
    scores: PlannedScores | None
    optimizer: str
    state_bytes: int
    data: PlannedData
    steps: int
    positions: int
    global_batch_size: int
    micro_batch_size: int
    tokens_per_step: int
    zero_stage: int
    zero_note: str | None
    memory: tuple[MemoryRow, ...]
    world_sizes: tuple[SizeRow, ...]
    warnings: tuple[str, ...]

    def memory_at(self, world_size: int) -> list[MemoryRow]:
        """Return the rows of a world size, one per stage."""
        return [row for row in self.memory if row.world_size == world_size]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as `plan --json` prints them."""
        return asdict(self) | {"memory": [row.to_dict() for row in self.memory]}


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Attributes:
        steps: Steps.
        epochs: Passes over the data; None if an epoch has no end.
        passes: Passes over each training source.
        sequences: Sequences.
        tokens: Tokens of the sequences.
        trained_tokens: Tokens whose prediction is trained.
        params: Parameters of the model.
        trained_params: Parameters that are trained.
        flops: Operations; see `cost.flops`.
    """

    steps: int
    epochs: float | None
    passes: tuple[float, ...]
    sequences: int
    tokens: int
    trained_tokens: int
    params: int
    trained_params: int
    flops: int

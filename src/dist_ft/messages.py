"""Messages between processes: frozen dataclasses, sent as one JSON line each.

Rank → supervisor → coordinator: the `Message` kinds. Back: `Reply`. What a rank is told at
its start is `run/attempt_spec.py`.
JSON, not pickle: a socket must not be able to run code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.slices import SavedState, WrittenFile
from dist_ft.typed_json import from_json

Outcome = Literal["completed", "stopped"]
Whereabouts = Literal["waits", "works", "stopped"]


class Phase(StrEnum):
    """What a rank does, in the order in which it goes through them after the same number of steps."""

    START = "start"
    LOAD = "load"
    EVALUATE = "evaluate"
    SAVE = "save"
    DATA = "data"
    FIRST_STEP = "first_step"
    STEP = "step"
    DRAIN = "drain"


@dataclass(frozen=True)
class Message:
    """Base of what a rank reports."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class RankStarted(Message):
    """The rank process is alive."""

    kind: ClassVar[str] = "rank_started"
    pid: int
    node_ip: str


@dataclass(frozen=True)
class RendezvousOpen(Message):
    """Rank 0 listens for the others."""

    kind: ClassVar[str] = "rendezvous_open"
    host: str
    port: int


@dataclass(frozen=True)
class PhaseChanged(Message):
    """What the rank does now."""

    kind: ClassVar[str] = "phase_changed"
    phase: Phase
    step: int


@dataclass(frozen=True)
class Loaded(Message):
    """The rank is built and has its part of the checkpoint, if any.

    Attributes:
        step: Completed steps.
        num_bytes: Bytes of slices that it read.
        notes: What a person should know of how it goes on; rank 0 only.
    """

    kind: ClassVar[str] = "loaded"
    step: int
    num_bytes: int
    notes: list[str]


@dataclass(frozen=True)
class StepDone(Message):
    """A step is done; rank 0 only.

    Attributes:
        row: Its row of metrics.jsonl.
        local_s: Seconds that each rank spent on its own part before the first word with the others.
    """

    kind: ClassVar[str] = "step_done"
    row: StepRow
    local_s: list[float]


@dataclass(frozen=True)
class EvalDone(Message):
    """The held-out data was measured; rank 0 only. `row` is the row of eval.jsonl."""

    kind: ClassVar[str] = "eval_done"
    row: EvalRow


@dataclass(frozen=True)
class Staged(Message):
    """A rank has written its slices of a step.

    Attributes:
        step: Completed steps.
        file: What was written.
        state: What the manifest says besides the files; rank 0 only.
        is_last: The run ends here.
        blocked_s: Seconds for which the save held training up.
        written_s: Seconds from its begin until the file was on the disk.
    """

    kind: ClassVar[str] = "staged"
    step: int
    file: WrittenFile
    state: SavedState | None
    is_last: bool = False
    blocked_s: float = 0.0
    written_s: float = 0.0


@dataclass(frozen=True)
class SaveFailed(Message):
    """A rank could not write its slices of a step.

    Attributes:
        step: Completed steps.
        reason: What the system said.
        is_last: The run ends here; otherwise it goes on without this checkpoint.
    """

    kind: ClassVar[str] = "save_failed"
    step: int
    reason: str
    is_last: bool


@dataclass(frozen=True)
class SaveSkipped(Message):
    """A save was due while the one before was still being written; rank 0 only."""

    kind: ClassVar[str] = "save_skipped"
    step: int


@dataclass(frozen=True)
class SaveStreamed(Message):
    """A rank had no memory for a copy of its slices, so training waited for the disk.

    Attributes:
        step: Completed steps.
        needed: Bytes of the copies of all ranks of the node.
        free: Bytes that were free there.
    """

    kind: ClassVar[str] = "save_streamed"
    step: int
    needed: int
    free: int


@dataclass(frozen=True)
class IntervalMeasured(Message):
    """The interval between checkpoints has changed (`checkpoint.every_steps: auto`); rank 0 only.

    Attributes:
        step: Completed steps.
        interval_s: Seconds between two checkpoints.
        num_steps: Steps in that time.
        cost_s: Seconds of training that a checkpoint costs.
        mtbf_s: Mean seconds between failures.
    """

    kind: ClassVar[str] = "interval_measured"
    step: int
    interval_s: float
    num_steps: int
    cost_s: float
    mtbf_s: float


@dataclass(frozen=True)
class Leaving(Message):
    """The rank was told to end (SIGTERM) and would like to do so behind a checkpoint."""

    kind: ClassVar[str] = "leaving"
    reason: str


@dataclass(frozen=True)
class Located(Message):
    """Where a rank is that seems to make no progress, found out by its supervisor.

    Attributes:
        state: waits (in a collective, for another rank), works, or stopped (by a signal or a debugger).
    """

    kind: ClassVar[str] = "located"
    state: Whereabouts


@dataclass(frozen=True)
class RankDone(Message):
    """The rank has ended as it should."""

    kind: ClassVar[str] = "rank_done"
    outcome: Outcome
    step: int


@dataclass(frozen=True)
class RankFailed(Message):
    """The rank has ended with an error (`errors.from_exception`).

    Attributes:
        error: Its wire form.
        is_death: It said nothing itself; its supervisor found it dead.
        step: The step whose numbers were bad.
    """

    kind: ClassVar[str] = "rank_failed"
    error: dict[str, str]
    is_death: bool = False
    step: int | None = None


@dataclass(frozen=True)
class NodeSampled(Message):
    """What a node is doing; from one supervisor of each node, every few seconds.

    Attributes:
        node: Its address.
        numbers: Name → number, such as `cpu_percent`.
    """

    kind: ClassVar[str] = "node_sampled"
    node: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Heartbeat(Message):
    """A supervisor with nothing else to say; its answer carries the stop flag."""

    kind: ClassVar[str] = "heartbeat"


_KINDS: dict[str, type[Message]] = {
    cls.kind: cls
    for cls in (
        RankStarted, RendezvousOpen, PhaseChanged, Loaded, StepDone, EvalDone, Staged, SaveFailed, SaveSkipped,
        SaveStreamed, IntervalMeasured, Leaving,
        Located, RankDone, RankFailed, NodeSampled, Heartbeat,
    )
}  # fmt: skip


def decode_message(data: dict[str, Any]) -> Message:
    """Return the message of `{kind, body}`, as a rank sends it.

    Raises:
        ValueError: An unknown kind.
    """
    kind = _KINDS.get(data["kind"])
    if kind is None:
        raise ValueError(f"unknown message kind {data['kind']!r}, expected one of {sorted(_KINDS)}")
    return from_json(kind, data["body"])


def message_to_dict(message: Message) -> dict[str, Any]:
    """Return `{kind, body}`, as a rank sends it; inverse of `decode_message`."""
    return {"kind": message.kind, "body": asdict(message)}


@dataclass(frozen=True)
class Envelope:
    """A message with its sender; a receiver drops what is not from the current attempt."""

    run_id: str
    attempt: int
    rank: int
    message: Message

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {"run_id": self.run_id, "attempt": self.attempt, "rank": self.rank, **message_to_dict(self.message)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Envelope:
        """Inverse of `to_dict`.

        Raises:
            ValueError: An unknown kind.
        """
        return cls(data["run_id"], data["attempt"], data["rank"], decode_message(data))


@dataclass(frozen=True)
class Reply:
    """What the coordinator answers.

    Attributes:
        stop: Checkpoint after this step and end.
        hold: The worker is to keep its place after its rank has ended: the group is formed anew from outside.
        abort: Why the rank is to be ended at once, or None.
        dump: Write down where the rank is, and say it (`Located`).
        committed_step: Newest checkpoint of this attempt; 0 before the first.
        rendezvous: `[host, port]` of rank 0, once known.
    """

    stop: bool = False
    hold: bool = False
    abort: str | None = None
    dump: bool = False
    committed_step: int = 0
    rendezvous: tuple[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reply:
        """Inverse of `to_dict`, also after JSON."""
        place = data["rendezvous"]
        return cls(**{**data, "rendezvous": (place[0], place[1]) if place else None})


@dataclass(frozen=True)
class CoordinatorAddress:
    """Where the coordinator of a run is, and the secret that its calls carry.

    The driver hands it to the supervisors and to Ray Train's controller, in memory; dist-ft writes it nowhere.

    Attributes:
        name: Name of the actor.
        namespace: Ray namespace of the name.
        secret: The run secret.
    """

    name: str
    namespace: str
    secret: str = field(repr=False)


def encode_line(data: dict[str, Any]) -> bytes:
    """Return one JSON line."""
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"

"""Defines the states of a run, the allowed transitions between them, and the contents of run.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dist_ft.typed_json import from_json

TRANSITIONS: dict[str, frozenset[str]] = {
    "starting": frozenset({"running", "resizing", "recovering", "stopping", "stopped", "failed"}),
    "running": frozenset({"resizing", "recovering", "stopping", "completed", "failed"}),
    "resizing": frozenset({"running", "recovering", "stopping", "completed", "failed"}),
    "recovering": frozenset({"running", "resizing", "stopping", "failed"}),
    "stopping": frozenset({"stopped", "completed", "failed"}),
    "stopped": frozenset({"starting"}),
    "completed": frozenset({"starting"}),
    "failed": frozenset({"starting"}),
}
FINAL = frozenset({"stopped", "completed", "failed"})
"""States in which no process changes the run any more."""
_NEEDED = ("run_id", "state", "attempt", "step", "max_steps", "world_size", "workers")


def check_transition(old: str, new: str) -> None:
    """Raise ValueError, naming both states, unless `new` may follow `old`."""
    if new not in TRANSITIONS[old]:
        raise ValueError(f"a run cannot go from {old} to {new}; allowed: {sorted(TRANSITIONS[old])}")


@dataclass(frozen=True)
class Worker:
    """A rank of the current attempt: its process and the address of its node."""

    rank: int
    pid: int
    node_ip: str


@dataclass
class RunRecord:
    """Holds the contents of run.json.

    Attributes:
        run_id: Name of the run.
        state: See `TRANSITIONS`.
        attempt: Current attempt; 0 before the first.
        step: Completed steps.
        max_steps: Steps of the run.
        world_size: Ranks of the current attempt.
        workers: Ranks of the attempt that have started, by rank.
        sink_ids: Id of each sink, by its key in `monitor`; the same over all attempts.
        active_s: Seconds that drivers have been at work on the run.
        useful_s: Seconds of the steps that count.
        goodput: `useful_s` divided by `active_s`.
        error: `{type, message}` of a failed run.
        result: `{final_loss, eval_loss, export_dir}` as far as known.
    """

    run_id: str
    state: str = "starting"
    attempt: int = 0
    step: int = 0
    max_steps: int = 0
    world_size: int = 0
    workers: list[Worker] = field(default_factory=list)
    sink_ids: dict[str, str] = field(default_factory=dict)
    active_s: float = 0.0
    useful_s: float = 0.0
    goodput: float = 0.0
    error: dict[str, str] | None = None
    result: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what run.json holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunRecord:
        """Inverse of `to_dict`; ignores keys of other versions.

        Raises:
            ValueError: A key is missing.
        """
        missing = [key for key in _NEEDED if key not in data]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        known = {item.name for item in fields(cls)}
        return from_json(cls, {key: value for key, value in data.items() if key in known})

    def move(self, new: str) -> None:
        """Change the state.

        Raises:
            ValueError: The change is not in the table.
        """
        if new != self.state:
            check_transition(self.state, new)
            self.state = new

"""Types that say where a run stands: the data cursor, the slices of trained state, and what is said of both.

Torch-free, so that the coordinator can read them. How slices are cut out of DeepSpeed is `zero/partitions.py`; how
they become a checkpoint is `checkpoint/`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import prod

ADAM_STATE = ("exp_avg", "exp_avg_sq")
"""State of AdamW: the two moments."""
STATE_KINDS = ("fp32", *ADAM_STATE)
"""What is stored of a parameter that AdamW trains: its fp32 master and the two moments."""
KNOWN_KINDS = (*STATE_KINDS, "z")
"""What is stored by any optimizer of `zero/optimizers.py`."""
Setting = float | int | str | bool | None | list[float]
"""A value of an optimizer group or of a schedule, as JSON has it; which keys there are is theirs to say."""


@dataclass(frozen=True)
class Cursor:
    """The whole resume state of the data stream.

    Attributes:
        epoch: Passes completed.
        position: Index of the next sequence, counted on across epochs.
    """

    epoch: int
    position: int


@dataclass(frozen=True)
class ParamInfo:
    """A trained parameter, as every process of a run must see it.

    Attributes:
        name: Its name in the model that is trained.
        shape: Full shape, whatever the ZeRO stage.
        export_name: The key under which an export stores it.
        state: Kinds of optimizer state that are stored of it.
    """

    name: str
    shape: tuple[int, ...]
    export_name: str
    state: tuple[str, ...] = ADAM_STATE

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that is stored of it."""
        return ("fp32", *self.state)


@dataclass(frozen=True)
class SliceKey:
    """A run of elements of one flattened tensor of trained state.

    Attributes:
        param: Name of the parameter.
        start: First element in the flattened parameter.
        kind: One of `KNOWN_KINDS`.
    """

    param: str
    start: int
    kind: str

    def encode(self) -> str:
        """Return the key of the slice inside its safetensors file."""
        return f"{self.param}|{self.start}|{self.kind}"

    @classmethod
    def decode(cls, text: str) -> SliceKey:
        """Inverse of `encode`.

        Raises:
            ValueError: The text is not a slice key.
        """
        param, start, kind = text.rsplit("|", 2)
        if kind not in KNOWN_KINDS:
            raise ValueError(f"slice key {text!r} has kind {kind!r}, expected one of {KNOWN_KINDS}")
        return cls(param, int(start), kind)


@dataclass(frozen=True)
class WrittenFile:
    """What was written: file name, size, and xxh3-128 of all bytes."""

    name: str
    num_bytes: int
    xxh3: str


@dataclass(frozen=True)
class Fingerprint:
    """What a checkpoint belongs to; a resume with another one is refused.

    Attributes:
        model: Hash of the base weights.
        data: Hash over the prepared training sources.
        seed: `run.seed`.
        method: What is trained, as text.
        global_batch_size: Sequences per step.
        objective: What is optimised, as text: `objective.kind`, and what else of the section changes a loss.
        optimizer: Whose state this is.
    """

    model: str
    data: str
    seed: int
    method: str
    global_batch_size: int
    objective: str = "sft"
    optimizer: str = "adamw"

    def to_dict(self) -> dict[str, str | int]:
        """Return JSON values without the fields that have their default: older manifests do not name them."""
        values = asdict(self)
        return {key.name: values[key.name] for key in fields(self) if values[key.name] != key.default}

    def differences(self, other: Fingerprint) -> list[str]:
        """Return `field: mine, theirs` for every field that differs."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}: checkpoint {mine[key]}, config {theirs[key]}" for key in mine if mine[key] != theirs[key]]


@dataclass(frozen=True)
class Probe:
    """Logits of a fixed prompt, by which an export is checked.

    Attributes:
        tokens: The prompt.
        columns: The vocabulary entries whose logits are kept.
        logits: Of each token, those of the columns [len(tokens), len(columns)].
    """

    tokens: tuple[int, ...]
    columns: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Environment:
    """What bitwise equality depends on besides world size and ZeRO stage.

    Attributes:
        versions: Of the packages that compute, by name.
        micro_batch_size: Sequences of a pass.
        num_threads: Threads of a rank.
        processor: Its machine type.
        device: Name of the GPU, or `cpu`.
    """

    versions: dict[str, str]
    micro_batch_size: int
    num_threads: int
    processor: str
    device: str

    def conditions(self) -> dict[str, str | int]:
        """Return every condition by name, versions included."""
        return {key: value for key, value in vars(self).items() if key != "versions"} | self.versions


@dataclass(frozen=True)
class SavedState:
    """What a manifest says of the saved state besides its files; rank 0 reports it.

    Attributes:
        step: Completed optimizer steps.
        cursor: Where the data stream goes on.
        zero_stage: Stage it was written at; any stage loads it.
        optimizer_step: Updates that the optimizer has made.
        fingerprint: What it belongs to.
        params: Every trained parameter.
        groups: Settings of each optimizer group at this step.
        schedule: The learning rate's schedule, with `max_steps`.
        probe: Logits of a fixed prompt; None if the ranks did not stop for them.
        environment: What bitwise equality depends on.
        optimizer_numbers: See `Manifest`.
    """

    step: int
    cursor: Cursor
    zero_stage: int
    optimizer_step: int
    fingerprint: Fingerprint
    params: tuple[ParamInfo, ...]
    groups: tuple[dict[str, Setting], ...]
    schedule: dict[str, Setting]
    probe: Probe | None
    environment: Environment
    optimizer_numbers: dict[str, float] = field(default_factory=dict)


def find_gaps(numel: int, ranges: list[tuple[int, int]]) -> str | None:
    """Say how `ranges` (start, length) fail to cover `[0, numel)` exactly once; None when they do."""
    end = 0
    for start, length in sorted(ranges):
        if start < end:
            return f"elements {start}..{min(end, start + length) - 1} are stored twice"
        if start > end:
            return f"elements {end}..{start - 1} are missing"
        end = start + length
    if end != numel:
        return f"elements {end}..{numel - 1} are missing" if end < numel else f"{end} elements stored of {numel}"
    return None

"""Types that say where a run stands: the data cursor and the slices of trained state.

Torch-free, so that the coordinator can read them. How slices are cut out of DeepSpeed is `zero/partitions.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

STATE_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is stored of a trained parameter: its fp32 master and the two Adam moments."""


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
    """

    name: str
    shape: tuple[int, ...]
    export_name: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ParamInfo:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        return cls(name=data["name"], shape=tuple(data["shape"]), export_name=data["export_name"])

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class SliceKey:
    """A run of elements of one flattened tensor of trained state.

    Attributes:
        param: Name of the parameter.
        start: First element in the flattened parameter.
        kind: One of `STATE_KINDS`.
    """

    param: str
    start: int
    kind: str

    def encode(self) -> str:
        """Returns the key of the slice inside its safetensors file."""
        return f"{self.param}|{self.start}|{self.kind}"

    @classmethod
    def decode(cls, text: str) -> SliceKey:
        """Inverse of `encode`.

        Raises:
            ValueError: The text is not a slice key.
        """
        param, start, kind = text.rsplit("|", 2)
        if kind not in STATE_KINDS:
            raise ValueError(f"slice key {text!r} has kind {kind!r}, expected one of {STATE_KINDS}")
        return cls(param, int(start), kind)


def find_gaps(numel: int, ranges: list[tuple[int, int]]) -> str | None:
    """Says how `ranges` (start, length) fail to cover `[0, numel)` exactly once; None when they do."""
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

"""Describes the columns of numbers that a shard has beside its tokens: from the rows themselves, or scored by a model.

A column holds an entry for each sample of a sequence (a label, a log-probability) or for each trained token (the
log-probabilities of a teacher's likeliest tokens). In an Arrow file it is one flat list a sequence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_ARROW = {"float32": pa.float32(), "float16": pa.float16(), "int32": pa.int32()}
Numbers = npt.NDArray[np.generic]
"""Entries of a column, of its dtype."""


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: Its name in the shard, and in `MicroBatch.numbers`.
        per: What an entry belongs to.
        dtype: Type of the numbers.
        width: Numbers of an entry. With 1, arrays have no axis for them.
    """

    name: str
    per: Literal["sample", "token"] = "sample"
    dtype: Literal["float32", "float16", "int32"] = "float32"
    width: int = 1

    @property
    def arrow_type(self) -> pa.DataType:
        """Type of the column in an Arrow file: the flat list of a sequence."""
        return pa.list_(_ARROW[self.dtype])

    def num_bytes(self, num_samples: int, num_trained_tokens: int) -> int:
        """Return the bytes of the column for so many samples and trained tokens."""
        entries = num_samples if self.per == "sample" else num_trained_tokens
        return entries * self.width * np.dtype(self.dtype).itemsize

    def shaped(self, flat: Numbers) -> Numbers:
        """Return the entries of a flat list."""
        return flat if self.width == 1 else flat.reshape(-1, self.width)

    def empty(self) -> Numbers:
        """Return no entries, as padding has."""
        return self.shaped(np.zeros(0, self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)

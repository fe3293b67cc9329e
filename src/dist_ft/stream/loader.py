"""Gives one rank the rows of a step. Owns how positions become arrays; the order itself is `order.py`.

Shapes: B rows of a micro batch, T tokens of its longest row (rounded up).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_ft.batch import IGNORE, layout_slots, num_micro_steps, round_up
from dist_ft.config import Config
from dist_ft.memory import BatchShape
from dist_ft.stream.cache import PreparedSplit
from dist_ft.stream.order import Order, SequenceId, SourceSpec, digest, shares, step_positions
from dist_ft.stream.shards import TokenShards

LENGTH_MULTIPLE = 8  # rounds T up: fewer distinct shapes, aligned matrices

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one pass on one rank; rows without a slot are padding and weigh nothing.

    Attributes:
        input_ids: [B, T].
        targets: [B, T], the token that each place must predict, or `IGNORE`.
        position_ids: [B, T], counted from 0 in each packed sample; restarts are what separates samples.
        slots: [B], slot in the step, -1 for padding.
    """

    input_ids: Ints
    targets: Ints
    position_ids: Ints
    slots: Ints


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a step, and the totals of the whole step (the same on every rank).

    Attributes:
        micro_batches: In the order they are run.
        num_tokens: Tokens of the global batch, padding excluded.
        num_trained_tokens: Divisor of the loss.
        digest: Digest of the global batch's sequences.
        position: The cursor after the step.
    """

    micro_batches: list[MicroBatch]
    num_tokens: int
    num_trained_tokens: int
    digest: str
    position: int


@dataclass(frozen=True)
class RankLayout:
    """Which part of a batch a rank computes."""

    rank: int
    world_size: int
    micro_batch_size: int


def build_order(shards: Sequence[TokenShards], weights: Sequence[float] | None, seed: int) -> Order:
    """Returns the order over opened sources; `weights` as in `DataConfig.weights`."""
    sizes = [opened.shard_sizes for opened in shards]
    taken = shares([sum(size) for size in sizes], weights)
    return Order(tuple(SourceSpec(size, share) for size, share in zip(sizes, taken, strict=True)), seed)


def largest_batch(config: Config, splits: Sequence[PreparedSplit]) -> BatchShape:
    """Returns the largest micro batch that these splits can give."""
    return BatchShape(
        num_sequences=config.train.micro_batch_size,
        num_tokens=round_up(max(split.max_tokens for split in splits), LENGTH_MULTIPLE),
        num_trained_tokens=max(split.max_trained_tokens for split in splits),
        gradient_checkpointing=config.train.gradient_checkpointing,
        has_eager_attention=config.model.attention == "eager",
    )


class TrainLoader:
    """Random access to the steps of a run."""

    def __init__(
        self,
        order: Order,
        shards: Sequence[TokenShards],
        layout: RankLayout,
        global_batch_size: int,
        total: int,
    ) -> None:
        self._order = order
        self._shards = shards
        self._layout = layout
        self._global_batch_size = global_batch_size
        self._total = total

    def step(self, step: int) -> StepBatch:
        """Returns this rank's rows of step `step`, counted from 0."""
        positions = step_positions(step, self._global_batch_size, self._total)
        ids = [self._order.locate(position) for position in positions]
        sizes = [self._shards[i.source].sizes(i.row) for i in ids]
        layout = layout_slots(
            [tokens for tokens, _ in sizes],
            self._layout.micro_batch_size,
            self._layout.world_size,
            self._global_batch_size,
        )
        return StepBatch(
            micro_batches=[self._micro_batch(ids, ranks[self._layout.rank]) for ranks in layout],
            num_tokens=sum(tokens for tokens, _ in sizes),
            num_trained_tokens=sum(trained for _, trained in sizes),
            digest=digest(ids),
            position=positions.stop,
        )

    def epoch(self, position: int) -> int:
        """Returns the epochs completed at a position."""
        return position // self._order.epoch_size

    def _micro_batch(self, ids: Sequence[SequenceId], slots: list[int]) -> MicroBatch:
        rows = [self._shards[ids[slot].source].read(ids[slot].row) for slot in slots]
        return collate(rows, slots, self._layout.micro_batch_size)


def num_eval_batches(shards: TokenShards, layout: RankLayout) -> int:
    """Returns the batches of a held-out split over all ranks, without those that only fill up."""
    return num_micro_steps(sum(shards.shard_sizes), layout.micro_batch_size, 1)


def eval_batches(shards: TokenShards, layout: RankLayout) -> Iterator[MicroBatch]:
    """Yields this rank's part of a held-out split; every rank gets the same number of batches.

    A batch holds the same rows whatever the number of ranks, so that it gives the same numbers. They are dealt round
    robin: this rank's i-th is number `i * world_size + rank` of all; those beyond the last are padding.
    """
    lengths = [shards.sizes(row)[0] for row in range(sum(shards.shard_sizes))]
    batches = [slots for (slots,) in layout_slots(lengths, layout.micro_batch_size, 1)]
    for first in range(0, len(batches), layout.world_size):
        mine = batches[first + layout.rank : first + layout.rank + 1]
        slots = mine[0] if mine else []
        yield collate([shards.read(row) for row in slots], slots, layout.micro_batch_size)


def collate(
    rows: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int32]]],
    slots: Sequence[int],
    num_rows: int,
) -> MicroBatch:
    """Pads rows to one length and fills up with padding rows."""
    length = round_up(max((len(ids) for ids, _, _ in rows), default=1), LENGTH_MULTIPLE)
    input_ids = np.zeros((num_rows, length), dtype=np.int64)
    targets = np.full((num_rows, length), IGNORE, dtype=np.int64)
    position_ids = np.tile(np.arange(length, dtype=np.int64), (num_rows, 1))
    for row, (ids, trained, starts) in enumerate(rows):
        count = len(ids)
        input_ids[row, :count] = ids
        targets[row, : count - 1] = np.where(trained[1:], ids[1:], IGNORE)
        for start in starts[1:]:
            position_ids[row, start:] = np.arange(length - start)
        if count < length and len(starts) > 1:
            # The padding after packed samples is a sample of its own.
            position_ids[row, count:] = np.arange(length - count)
    slot_column = np.full(num_rows, -1, dtype=np.int64)
    slot_column[: len(slots)] = slots
    return MicroBatch(input_ids, targets, position_ids, slot_column)

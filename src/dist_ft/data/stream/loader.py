"""Gives one rank the rows of a step. Owns how positions become arrays; `order.py` owns the order.

While a step is computed, a background thread makes the batches of the next steps, and a few others fetch the files of
the next window. This only saves time: a loader has no state but the step that the caller asks for.

Shapes: B rows of a micro batch, T tokens of its longest row (rounded up).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dist_ft.config import Config
from dist_ft.config.data_sections import DataConfig
from dist_ft.data.shards.columns import Numbers
from dist_ft.data.shards.shard_file import IndexRows
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.data.stream.order import WINDOW_SHARDS, Order, SequenceId, SequenceIds, digest, step_positions
from dist_ft.data.stream.token_shards import Row, TokenShards
from dist_ft.memory import BatchShape, ModelShape, fitting_micro_batch
from dist_ft.slots import IGNORE, SlotTotals, layout_slots, num_micro_steps, round_up

NUM_FETCHERS = 4
LENGTH_MULTIPLE = 8  # rounds T up: fewer distinct shapes, aligned matrices

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Holds the rows of one pass on one rank. Rows without a slot are padding with weight zero.

    Attributes:
        input_ids: [B, T].
        targets: [B, T], the token to predict at each place, or `IGNORE`.
        position_ids: [B, T], counted from 0 in each packed sample; a restart at 0 separates two samples.
        slots: [B], slot in the step, -1 for padding; rows of one slot are neighbours.
        samples: [B, T], for each place its sample, numbered row by row from 0; -1 for padding. Samples of one record
            have neighbouring numbers, whether they are rows of their own or packed into one.
        num_samples: Number of samples.
        numbers: Columns of numbers: entries of the samples, or of the trained tokens, in the order of the rows. Empty
            where the shards have none, and in a batch of padding alone.
    """

    input_ids: Ints
    targets: Ints
    position_ids: Ints
    slots: Ints
    samples: Ints
    num_samples: int
    numbers: dict[str, Numbers]


@dataclass(frozen=True)
class StepBatch:
    """Holds one rank's share of a step, and the totals of the whole step (the same on every rank).

    Attributes:
        micro_batches: Micro batches in the order of computation.
        mismatched: Their mismatched answers, if the layout has them.
        totals: Totals of the slots of the global batch.
        digest: Digest of the global batch's sequences.
        position: The cursor after the step.
    """

    micro_batches: list[MicroBatch]
    mismatched: list[MicroBatch]
    totals: SlotTotals
    digest: str
    position: int


@dataclass(frozen=True)
class RankLayout:
    """Describes the part of a batch that a rank computes.

    Attributes:
        rank: The rank.
        world_size: Number of ranks.
        micro_batch_size: Slots of a pass.
        rows_per_slot: Rows of a slot; neighbours in a pass.
        has_mismatched: Whether every second sample is a mismatched answer (`Window.with_mismatched`). Such samples run
            in passes of their own, before those of the step.
    """

    rank: int
    world_size: int
    micro_batch_size: int
    rows_per_slot: int = 1
    has_mismatched: bool = False


def build_order(shards: Sequence[TokenShards], data: DataConfig, seed: int) -> Order:
    """Return the order over opened sources."""
    sizes = [opened if opened.known_sizes is None else opened.known_sizes for opened in shards]
    return Order(sizes, data.weights, seed, data.shuffle, data.exhaust)


def fitting_batch(
    config: Config,
    model: ModelShape,
    splits: Sequence[PreparedSplit],
    world_size: int,
    limit_bytes: int | None,
    rows_per_slot: int,
) -> BatchShape:
    """Return the largest micro batch that these splits can give, with fewer sequences if memory is short.

    Args:
        config: The run config.
        model: The model.
        splits: All splits that a worker reads.
        world_size: Number of workers.
        limit_bytes: Memory of a worker; None if unknown, which leaves the batch as configured.
        rows_per_slot: Rows of a slot, which is one sequence of a split; no row is longer than `data.seq_len`.
    """
    longest_row = min(max(split.max_tokens for split in splits), config.data.seq_len)
    batch = BatchShape(
        num_sequences=config.train.micro_batch_size,
        num_tokens=round_up(longest_row, LENGTH_MULTIPLE) * rows_per_slot,
        num_trained_tokens=max(split.max_trained_tokens for split in splits),
        gradient_checkpointing=config.train.gradient_checkpointing,
        has_eager_attention=config.model.attention == "eager",
    )
    if limit_bytes is None:
        return batch
    fitting = fitting_micro_batch(
        model,
        batch,
        stage=config.zero_stage,
        world_size=world_size,
        limit_bytes=limit_bytes,
        offload=config.zero.offload,
    )
    return replace(batch, num_sequences=fitting)


class TrainLoader:
    """Gives random access to the steps of a run; consecutive steps are fastest. The caller must `close` it.

    Args:
        order: Order of the sequences.
        shards: Shards of each source.
        layout: This rank's part of a batch.
        global_batch_size: Sequences of a step.
        total: Positions of the run.
        prefetch_steps: Steps to prepare ahead of the requested one; 0 makes each step on request.
    """

    def __init__(
        self,
        order: Order,
        shards: Sequence[TokenShards],
        layout: RankLayout,
        global_batch_size: int,
        total: int,
        prefetch_steps: int = 0,
    ) -> None:
        self._order, self._shards, self._layout = order, shards, layout
        self._global_batch_size, self._total = global_batch_size, total
        self._prefetch_steps = prefetch_steps
        # One thread, because shards are not safe for several threads, and steps are taken in order anyway.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="fetch")
        self._ready: deque[tuple[int, Future[StepBatch]]] = deque()
        self._fetched: dict[int, tuple[int, int]] = {}

    def step(self, step: int) -> StepBatch:
        """Return this rank's rows of step `step`, counted from 0; raise errors of the background threads."""
        self._look_ahead(step)
        return self._ready.popleft()[1].result()

    def is_ready(self, step: int, within_s: float) -> bool:
        """Return whether the rows of a step are ready within some seconds; if not, `step` would wait for them."""
        self._look_ahead(step)
        return not wait([self._ready[0][1]], within_s).not_done

    def epoch(self, position: int) -> int:
        """Return the epochs completed at a position."""
        return self._order.epoch(position)

    def close(self) -> None:
        """End the threads; whatever they wait for ends with an error."""
        for opened in self._shards:
            opened.close()
        self._maker.shutdown(cancel_futures=True)
        self._fetchers.shutdown(cancel_futures=True)

    def _look_ahead(self, step: int) -> None:
        """Start making the rows of a step and of the steps after it."""
        if self._ready and self._ready[0][0] != step:
            for _, future in self._ready:
                future.cancel()
            self._ready.clear()
        following = self._ready[-1][0] + 1 if self._ready else step
        for ahead in range(following, step + self._prefetch_steps + 1):
            if ahead == step or ahead * self._global_batch_size < self._total:
                self._ready.append((ahead, self._maker.submit(self._make, ahead)))

    def _make(self, step: int) -> StepBatch:
        positions = step_positions(step, self._global_batch_size, self._total)
        self._fetch_ahead(positions.start)
        ids = self._order.locate(np.arange(positions.start, positions.stop))
        index = self._index_rows(ids)
        layout = layout_slots(
            index.num_tokens.tolist(), self._layout.micro_batch_size, self._layout.world_size, self._global_batch_size
        )
        named = list(ids)
        mine = [ranks[self._layout.rank] for ranks in layout]
        with_mismatched = mine if self._layout.has_mismatched else []
        return StepBatch(
            micro_batches=[self._micro_batch(named, slots) for slots in mine],
            mismatched=[self._micro_batch(named, slots, is_mismatched=True) for slots in with_mismatched],
            totals=index.totals,
            digest=digest(ids),
            position=positions.stop,
        )

    def _index_rows(self, ids: SequenceIds) -> IndexRows:
        index = IndexRows(*(np.zeros(len(ids), np.int64) for _ in range(3)))
        groups = ids.source << 32 | ids.shard
        for group in np.unique(groups).tolist():
            mine = np.flatnonzero(groups == group)
            found = self._shards[group >> 32].index_rows(group & 0xFFFFFFFF, ids.row[mine])
            index.num_tokens[mine], index.num_trained_tokens[mine] = found.num_tokens, found.num_trained_tokens
            index.num_samples[mine] = found.num_samples
        return index

    def _micro_batch(self, ids: Sequence[SequenceId], slots: list[int], is_mismatched: bool = False) -> MicroBatch:
        rows = [self._shards[ids[slot].source].read(ids[slot].shard, ids[slot].row) for slot in slots]
        return micro_batch(rows, slots, self._layout, is_mismatched)

    def _fetch_ahead(self, position: int) -> None:
        """Start fetching the shards of the window at a position and of the next window to this machine.

        Errors are ignored here, because reading the shard raises them again.
        """
        if all(opened.is_local for opened in self._shards):
            return
        for source, (window, shards) in enumerate(self._order.windows(position)):
            if self._fetched.get(source) != window:
                self._fetched[source] = window
                for shard in shards.tolist():
                    self._fetchers.submit(self._shards[source].fetch, shard)


def num_eval_batches(shards: TokenShards, layout: RankLayout) -> int:
    """Return the number of batches of a held-out split over all ranks, without padding batches."""
    counts = shards.num_sequences(np.arange(shards.num_shards))
    windows = [int(counts[begin : begin + WINDOW_SHARDS].sum()) for begin in range(0, len(counts), WINDOW_SHARDS)]
    return sum(num_micro_steps(count, layout.micro_batch_size, 1) for count in windows)


def eval_batches(shards: TokenShards, layout: RankLayout, is_mismatched: bool = False) -> Iterator[MicroBatch]:
    """Yield this rank's part of a held-out split; every rank gets the same number of batches.

    A batch holds the same rows at any number of ranks, so that it gives the same numbers. Batches are dealt round
    robin: the i-th batch of this rank is number `i * world_size + rank` of all, and batches beyond the last are
    padding. Slots count the rows of the split.
    """
    whole = _all_eval_batches(shards, layout.micro_batch_size)
    for number in range(-(-num_eval_batches(shards, layout) // layout.world_size) * layout.world_size):
        slots, places = next(whole, ([], []))
        if number % layout.world_size == layout.rank:
            yield micro_batch([shards.read(*place) for place in places], slots, layout, is_mismatched)


def _all_eval_batches(shards: TokenShards, micro_batch_size: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yield slots and (shard, row) of each batch; a batch has rows of similar length from one window of shards."""
    first = 0
    for begin in range(0, shards.num_shards, WINDOW_SHARDS):  # as many shards as a reader keeps open
        members = np.arange(begin, min(begin + WINDOW_SHARDS, shards.num_shards))
        held = list(zip(members.tolist(), shards.num_sequences(members).tolist(), strict=True))
        rows = [(shard, row) for shard, count in held for row in range(count)]
        lengths = [n for shard, count in held for n in shards.index_rows(shard, np.arange(count)).num_tokens.tolist()]
        for (slots,) in layout_slots(lengths, micro_batch_size, 1):
            yield [first + slot for slot in slots], [rows[slot] for slot in slots]
        first += len(rows)


def micro_batch(
    sequences: Sequence[Row], slots: Sequence[int], layout: RankLayout, is_mismatched: bool = False
) -> MicroBatch:
    """Return the rows of some slots. A slot of several rows is one sequence that is cut where its samples begin.

    Args:
        sequences: The sequence of each slot.
        slots: The slots.
        layout: How they become rows.
        is_mismatched: Take the mismatched answers instead of the others.
    """
    if layout.has_mismatched:
        sequences = [every_second(sequence, int(is_mismatched)) for sequence in sequences]
    if layout.rows_per_slot == 1:
        return collate(sequences, slots, layout.micro_batch_size)
    rows: list[Row] = []
    first = np.zeros(1, np.int32)
    for sequence in sequences:
        ids, trained, starts, numbers = sequence
        ends = [*starts[1:].tolist(), len(ids)]
        cut = [Row(ids[a:b], trained[a:b], first) for a, b in zip(starts.tolist(), ends, strict=True)]
        rows += [cut[0]._replace(numbers=numbers), *cut[1:]]  # all of the sequence, in the order of its samples
    of_rows = [slot for slot in slots for _ in range(layout.rows_per_slot)]
    return collate(rows, of_rows, layout.micro_batch_size * layout.rows_per_slot)


def every_second(sequence: Row, first: int) -> Row:
    """Return a sequence of every second of its samples, beginning with the first or the second."""
    ids, trained, starts, numbers = sequence
    spans = list(zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True))[first::2]
    lengths = [end - start for start, end in spans]
    return Row(
        np.concatenate([ids[start:end] for start, end in spans]),
        np.concatenate([trained[start:end] for start, end in spans]),
        np.cumsum([0, *lengths[:-1]]).astype(np.int32),
        {name: values[first::2] for name, values in numbers.items()},
    )


def collate(rows: Sequence[Row], slots: Sequence[int], num_rows: int) -> MicroBatch:
    """Pad rows to one length and add padding rows up to `num_rows`."""
    length = round_up(max((len(row.input_ids) for row in rows), default=1), LENGTH_MULTIPLE)
    input_ids = np.zeros((num_rows, length), dtype=np.int64)
    targets = np.full((num_rows, length), IGNORE, dtype=np.int64)
    position_ids = np.tile(np.arange(length, dtype=np.int64), (num_rows, 1))
    is_trained = np.zeros((num_rows, length), dtype=np.bool_)
    samples = np.full((num_rows, length), -1, dtype=np.int64)
    num_samples = 0
    numbers: dict[str, list[Numbers]] = {}
    for row, (ids, trained, starts, of_row) in enumerate(rows):
        count = len(ids)
        input_ids[row, :count] = ids
        is_trained[row, :count] = trained
        samples[row, :count] = num_samples + np.repeat(np.arange(len(starts)), np.diff(starts, append=count))
        num_samples += len(starts)
        for name, values in of_row.items():
            numbers.setdefault(name, []).append(values)
        if len(starts) > 1:
            # The padding after packed samples counts as a sample of its own.
            ends = np.append(starts, count) if count < length else starts
            position_ids[row] -= np.repeat(ends, np.diff(ends, append=length))
    np.copyto(targets[:, :-1], input_ids[:, 1:], where=is_trained[:, 1:])
    slot_column = np.full(num_rows, -1, dtype=np.int64)
    slot_column[: len(slots)] = slots
    columns = {name: np.concatenate(values) for name, values in numbers.items()}
    return MicroBatch(input_ids, targets, position_ids, slot_column, samples, num_samples, columns)

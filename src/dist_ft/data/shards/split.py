"""Defines a prepared split: the token shards of one training source, or of the held-out data.

A split is planned from the listing of its sources alone, and its shards are made one by one on any machine. When all
exist, their sizes are written to `splits/<key>.json` and the split is complete. In mode `stream` a run starts earlier
and reads the sizes when it needs them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dist_ft.config.data_sections import DataConfig
from dist_ft.data.curation.filters import describe_removed
from dist_ft.data.shards.counts import MAX_UNREAD, Counts, total
from dist_ft.data.shards.make import check_bad_rows, check_trained, quarantine_name, read_infos
from dist_ft.data.shards.request import PlannedShard, SplitPlan, unread_of_first_rows
from dist_ft.data.shards.shard_file import INFO
from dist_ft.layout import FORMAT_VERSION
from dist_ft.printable import excerpt
from dist_ft.slots import SlotTotals
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import Store


@dataclass(frozen=True)
class PreparedSplit:
    """A split in a store.

    Attributes:
        address: The store: a path or a URL.
        key: See `SplitPlan`.
        num_shards: Number of token shards.
        counts: Totals of the whole split; None while the split is incomplete.
        removed_rows: Number of rows that the config removes, by rule.
        max_tokens: Tokens of the longest sequence; `data.seq_len` while the split is incomplete.
        max_trained_tokens: Most trained tokens of one sequence; `data.seq_len` while the split is incomplete.
        made_sizes: While the split is incomplete, the sequences of each shard that exists, None for the others. It
            saves readers one request to the store per shard; empty if nothing is known.
        early_unread: Unread keys of the first rows, while the split is incomplete; see `Counts.unread`.
        score_key: Key of the scores that a reader needs besides (`score_file.py`); empty for none.
    """

    address: str
    key: str
    num_shards: int
    counts: Counts | None
    removed_rows: dict[str, int]
    max_tokens: int
    max_trained_tokens: int
    made_sizes: tuple[int | None, ...] = ()
    early_unread: tuple[str, ...] = ()
    score_key: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether every shard exists."""
        return self.counts is not None

    @property
    def known_counts(self) -> Counts:
        """Totals of a complete split."""
        assert self.counts is not None, "shards of the split are still to be made"
        return self.counts

    @property
    def totals(self) -> SlotTotals:
        """The totals of the sequences, from which the divisor of a loss follows."""
        counts = self.known_counts
        return SlotTotals(counts.num_sequences, counts.num_tokens, counts.num_trained_tokens, counts.num_samples)

    def with_sizes(self, sizes: Mapping[int, int]) -> PreparedSplit:
        """Return the split with the sequences of more of its shards, by their place in the source's order."""
        if self.is_complete or not sizes:
            return self
        known = self.made_sizes or (None,) * self.num_shards
        return replace(self, made_sizes=tuple(sizes.get(shard, size) for shard, size in enumerate(known)))

    def read_keys(self) -> list[str]:
        """Return the keys of the shards, in the source's order."""
        keys: list[str] = _read(open_store(self.address), _list_name(self.key))["keys"]
        return keys

    def read_sizes(self) -> list[int]:
        """Return the sequences of each shard of a complete split."""
        sizes: list[int] = _read(open_store(self.address), _sizes_name(self.key))["sizes"]
        return sizes

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PreparedSplit:
        """Inverse of `dataclasses.asdict`, also after JSON; extra keys are ignored."""
        values = {field.name: data[field.name] for field in fields(cls)}
        counts = Counts.from_dict(data["counts"]) if data["counts"] else None
        lists = {name: tuple(data[name]) for name in ("made_sizes", "early_unread")}
        return cls(**{**values, **lists, "counts": counts})


def made_keys(store: Store) -> set[str]:
    """Return the keys of the token shards and of the scores that exist."""
    return {name.removesuffix(INFO) for name in store.names("") if name.endswith(INFO) and "/" not in name}


def missing_shards(plans: Sequence[SplitPlan], store: Store) -> list[tuple[SplitPlan, PlannedShard]]:
    """Return the shards that are not made yet, plan by plan in file order, without repeats inside a plan.

    The files in `splits/` do not count, because a shard that was damaged and deleted must be made again.
    """
    made = made_keys(store)
    return [
        (plan, shard)
        for plan in plans
        for shard in {shard.key: shard for shard in plan.shards}.values()
        if shard.key not in made
    ]


def complete_split(plan: SplitPlan, store: Store, address: str) -> PreparedSplit:
    """Return a split whose shards all exist, and write its description to the store.

    Raises:
        DataError: No token of the split is trained.
    """
    name = _sizes_name(plan.key)
    if _exists(store, name):
        split = _decode(_read(store, name)["split"], address)
        if split.known_counts.num_bad_rows == 0 or plan.request.bad_rows == "skip":
            return split
    keys = [shard.key for shard in plan.shards]
    infos = read_infos(store, keys)
    for info in infos:
        check_bad_rows(plan.request, info, store)
    counts = total(info.counts for info in infos)
    split = PreparedSplit(
        address=address,
        key=plan.key,
        num_shards=len(infos),
        counts=counts,
        removed_rows=plan.request.removed.counts,
        max_tokens=max((info.max_tokens for info in infos), default=0),
        max_trained_tokens=max((info.max_trained_tokens for info in infos), default=0),
    )
    check_trained(plan.request, counts, store, keys)
    if counts.num_bad_rows:
        store.put(quarantine_of(plan.key), _quarantines(plan, store))
    write_list(plan, store)
    _write(store, name, {"split": _encode(split), "sizes": [info.counts.num_sequences for info in infos]})
    return split


def _encode(split: PreparedSplit) -> dict[str, Any]:
    """Return a complete split as `splits/<key>.json` has it, with the counts on one level with the other fields."""
    return {
        "address": split.address, "key": split.key, "is_complete": True, "num_shards": split.num_shards,
        **asdict(split.known_counts), "removed_rows": split.removed_rows, "max_tokens": split.max_tokens,
        "max_trained_tokens": split.max_trained_tokens,
    }  # fmt: skip


def _decode(data: dict[str, Any], address: str) -> PreparedSplit:
    counts = Counts.from_dict(data)
    names = ("key", "num_shards", "removed_rows", "max_tokens", "max_trained_tokens")
    return PreparedSplit(address=address, counts=counts, **{name: data[name] for name in names})


def _quarantines(plan: SplitPlan, store: Store) -> Iterator[bytes]:
    for shard in plan.shards:
        with suppress(FileNotFoundError):
            yield store.read(quarantine_name(shard.key))


def open_ended_split(plan: SplitPlan, store: Store, address: str, made_sizes: Mapping[str, int]) -> PreparedSplit:
    """Return a split whose shards are not all made yet, for mode `stream`.

    Args:
        plan: The split.
        store: Store of the shards.
        address: Address of the store.
        made_sizes: Sequences of the shards that exist, by key.
    """
    write_list(plan, store)
    longest = plan.request.seq_len
    return PreparedSplit(
        address,
        plan.key,
        len(plan.shards),
        counts=None,
        removed_rows={},
        max_tokens=longest,
        max_trained_tokens=longest - 1,
        made_sizes=tuple(made_sizes.get(shard.key) for shard in plan.shards) if made_sizes else (),
        early_unread=unread_of_first_rows(plan),
    )


def write_list(plan: SplitPlan, store: Store) -> None:
    """Write the list of a split's shards, by which readers find them."""
    if not _exists(store, _list_name(plan.key)):
        _write(store, _list_name(plan.key), {"keys": [shard.key for shard in plan.shards]})


def quarantine_of(key: str) -> str:
    """Return the name, in the store, of the file of a split's bad rows: location, problem and row of each."""
    return f"splits/{key}.quarantine.jsonl"


def _list_name(key: str) -> str:
    return f"splits/{key}.keys.json"


def _sizes_name(key: str) -> str:
    return f"splits/{key}.json"


def _exists(store: Store, name: str) -> bool:
    try:
        store.size(name)
    except FileNotFoundError:
        return False
    return True


def _read(store: Store, name: str) -> dict[str, Any]:
    data = json.loads(store.read(name))
    assert data["format_version"] == FORMAT_VERSION
    return dict(data)


def _write(store: Store, name: str, data: dict[str, Any]) -> None:
    store.put(name, [json.dumps({"format_version": FORMAT_VERSION, **data}).encode()])


_LONG = {"truncate": "are cut", "drop": "are left out", "split": "are made into pieces"}


def describe_omissions(
    splits: Sequence[PreparedSplit], eval_split: PreparedSplit | None, data: DataConfig
) -> list[str]:
    """Return a line for each kind of row or sample that was left out or cut; every display of a split uses them."""
    named = [(f"data.train.{index}", _unread(split)) for index, split in enumerate(splits)]
    known = {key for _, keys in named for key in keys}
    lines = list(_lines(splits, data))
    if eval_split:
        lines += [f"held-out data: {line}" for line in _lines([eval_split], data)]
        named.append(("held-out data", tuple(key for key in _unread(eval_split) if key not in known)))
    return lines + [describe_unread(name, keys) for name, keys in named if keys]


def describe_unread(name: str, keys: Sequence[str]) -> str:
    """Return the warning that rows have keys to which nothing gives a meaning.

    Args:
        name: The source of the rows.
        keys: See `Counts.unread`.
    """
    shown = ", ".join(excerpt(key).strip("'\"") for key in keys) + (", ..." if len(keys) == MAX_UNREAD else "")
    return (
        f"{name} has keys that are not read: {shown}; if one says what to train, see docs/data.md, else name it in "
        "data.train[].ignore"
    )


def _unread(split: PreparedSplit) -> tuple[str, ...]:
    return split.counts.unread if split.counts else split.early_unread


def _lines(splits: Sequence[PreparedSplit], data: DataConfig) -> Iterator[str]:
    counts = total(split.counts for split in splits if split.counts)
    removed = sum((Counter(split.removed_rows) for split in splits), Counter[str]())
    if removed:
        yield f"{removed.total():,} rows are left out by data.curation and max_rows: {describe_removed(removed)}"
    if counts.num_untrained_rows:
        yield f"{counts.num_untrained_rows:,} rows have no trained token and are left out"
    if counts.num_long_samples:
        how = _LONG[data.long_samples]
        yield f"{counts.num_long_samples:,} samples are longer than data.seq_len={data.seq_len} and {how}"
    if counts.num_unended:
        yield (
            f"{counts.num_unended:,} answers end without a token at which generation stops, so stopping is not learnt; "
            "`dist-ft data check` says which, and what to do"
        )
    if counts.num_bad_rows:
        with_bad = [split for split in splits if split.counts and split.counts.num_bad_rows]
        paths = ", ".join(f"{split.address}/{quarantine_of(split.key)}" for split in with_bad)
        yield f"{counts.num_bad_rows:,} bad rows are left out; they are in {paths}"

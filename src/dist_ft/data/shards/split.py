"""Splits: the token shards that together are one training source, or the held-out data.

A split is planned from the listing of its sources alone; its shards are made one by one, anywhere; once all are there,
their sizes are written down in `splits/<key>.json` and the split is complete. In mode `stream` a run starts before that
and asks for sizes as it goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_ft.data.shards.make import Counts, check_bad_rows, check_trained, quarantine_name, read_infos
from dist_ft.data.shards.request import PlannedShard, SplitPlan
from dist_ft.data.shards.shard_file import INFO, ShardInfo
from dist_ft.layout import FORMAT_VERSION
from dist_ft.slots import SlotTotals
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import Store


@dataclass(frozen=True)
class PreparedSplit:
    """A split in a store. All counts are of the whole split; of one that is not complete they are not known, and 0.

    Attributes:
        address: The store: a path or a URL.
        key: As in `SplitPlan`.
        is_complete: Whether every shard is there.
        num_shards: Token shards.
        num_rows: Rows used, those that give no trained token included.
        num_sequences: Sequences after packing.
        num_tokens: Tokens of all sequences.
        num_trained_tokens: Tokens whose prediction is trained.
        num_untrained_rows: Rows left out because no token of theirs would be trained.
        num_long_samples: Samples longer than `seq_len`, treated as `data.long_samples` says.
        num_bad_rows: Rows left out because they cannot be used; `quarantine_of` names them.
        removed_rows: Rows that the config leaves out, by rule.
        max_tokens: Tokens of the longest sequence; of a split that is not complete, `data.seq_len`.
        max_trained_tokens: Most trained tokens of one sequence; likewise.
    """

    address: str
    key: str
    is_complete: bool
    num_shards: int
    num_rows: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_untrained_rows: int = 0
    num_long_samples: int = 0
    num_bad_rows: int = 0
    removed_rows: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 0
    max_trained_tokens: int = 0

    @property
    def totals(self) -> SlotTotals:
        """What the sequences hold, as the divisor of a loss needs it."""
        return SlotTotals(self.num_sequences, self.num_tokens, self.num_trained_tokens)

    def read_keys(self) -> list[str]:
        """Returns the keys of the shards, in the source's order."""
        keys: list[str] = _read(open_store(self.address), _list_name(self.key))["keys"]
        return keys

    def read_sizes(self) -> list[int]:
        """Returns the sequences of each shard of a complete split."""
        sizes: list[int] = _read(open_store(self.address), _sizes_name(self.key))["sizes"]
        return sizes

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PreparedSplit:
        """Inverse of `dataclasses.asdict`, extra keys ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def missing_shards(plans: Sequence[SplitPlan], store: Store) -> list[tuple[SplitPlan, PlannedShard]]:
    """Returns the shards that are yet to be made, plan by plan in file order, each once a plan.

    What `splits/` says is not asked: a shard that was damaged and deleted is to be made anew.
    """
    made = {name.removesuffix(INFO) for name in store.names("") if name.endswith(INFO) and "/" not in name}
    return [
        (plan, shard)
        for plan in plans
        for shard in {shard.key: shard for shard in plan.shards}.values()
        if shard.key not in made
    ]


def complete_split(plan: SplitPlan, store: Store, address: str) -> PreparedSplit:
    """Returns a split all of whose shards are there, and writes down what they hold.

    Raises:
        DataError: Nothing of it is trained.
    """
    name = _sizes_name(plan.key)
    if _exists(store, name):
        split = PreparedSplit.from_dict({**_read(store, name)["split"], "address": address})
        if split.num_bad_rows == 0 or plan.request.bad_rows == "skip":
            return split
    infos = read_infos(store, [shard.key for shard in plan.shards])
    for info in infos:
        check_bad_rows(plan.request, info, store)
    split = _total(plan, infos, address)
    counts = Counts(split.num_rows, split.num_untrained_rows, split.num_long_samples, split.num_bad_rows)
    check_trained(plan.request, split.num_trained_tokens, counts, store, [shard.key for shard in plan.shards])
    if split.num_bad_rows:
        store.put(quarantine_of(plan.key), _quarantines(plan, store))
    write_list(plan, store)
    _write(store, name, {"split": asdict(split), "sizes": [info.num_sequences for info in infos]})
    return split


def _quarantines(plan: SplitPlan, store: Store) -> Iterator[bytes]:
    for shard in plan.shards:
        with suppress(FileNotFoundError):
            yield store.read(quarantine_name(shard.key))


def open_ended_split(plan: SplitPlan, store: Store, address: str) -> PreparedSplit:
    """Returns a split whose shards are yet to come, for mode `stream`."""
    write_list(plan, store)
    longest = plan.request.seq_len
    return PreparedSplit(address, plan.key, False, len(plan.shards), max_tokens=longest, max_trained_tokens=longest - 1)


def write_list(plan: SplitPlan, store: Store) -> None:
    """Writes down which shards a split has; readers find them by it."""
    if not _exists(store, _list_name(plan.key)):
        _write(store, _list_name(plan.key), {"keys": [shard.key for shard in plan.shards]})


def _total(plan: SplitPlan, infos: Sequence[ShardInfo], address: str) -> PreparedSplit:
    return PreparedSplit(
        address=address,
        key=plan.key,
        is_complete=True,
        num_shards=len(infos),
        num_rows=sum(info.num_rows for info in infos),
        num_sequences=sum(info.num_sequences for info in infos),
        num_tokens=sum(info.num_tokens for info in infos),
        num_trained_tokens=sum(info.num_trained_tokens for info in infos),
        num_untrained_rows=sum(info.num_untrained_rows for info in infos),
        num_long_samples=sum(info.num_long_samples for info in infos),
        num_bad_rows=sum(info.num_bad_rows for info in infos),
        removed_rows=plan.request.removed.counts,
        max_tokens=max((info.max_tokens for info in infos), default=0),
        max_trained_tokens=max((info.max_trained_tokens for info in infos), default=0),
    )


def quarantine_of(key: str) -> str:
    """Name, where the token shards are kept, of the rows of a split that were left out as bad: place, problem, row."""
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

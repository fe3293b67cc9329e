"""What the preparation makes of a config."""

from __future__ import annotations

from pathlib import Path

from dist_ft.model.embedded import byte_tokenizer
from dist_ft.tasks.prepare import prepare_splits
from tests.helpers.configs import tiny_config


def test_what_is_trained_on_is_a_part_of_what_was_prepared(tmp_path: Path) -> None:
    splits = {}
    for train_on in ("assistant", "last", "all"):
        (splits[train_on],), held_out = prepare_splits(tiny_config(tmp_path, data__train_on=train_on), byte_tokenizer())
        assert held_out is not None and held_out.key != splits[train_on].key
    assert len({split.key for split in splits.values()}) == 3
    assert len({split.num_tokens for split in splits.values()}) == 1
    # Every conversation has one answer; of all tokens only the first of each is not trained.
    trained = {train_on: split.num_trained_tokens for train_on, split in splits.items()}
    assert trained["assistant"] == trained["last"] < trained["all"]
    assert trained["all"] == splits["all"].num_tokens - splits["all"].num_sequences

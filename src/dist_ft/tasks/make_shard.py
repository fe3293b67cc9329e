"""Makes one token shard: the body of the Ray tasks that prepare data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dist_ft.config import config_from_dict
from dist_ft.config.schema import SourceConfig
from dist_ft.errors import DataError
from dist_ft.model.base import load_tokenizer
from dist_ft.storage.objects import open_store
from dist_ft.stream.make_shard import make_shard
from dist_ft.stream.parts import Part
from dist_ft.tasks.prepare import cache_address, make_renderer, split_requests


def run(
    config: dict[str, Any], take_held_out: bool, source: dict[str, Any], part: dict[str, Any], key: str
) -> dict[str, Any]:
    """Returns the shard's `ShardInfo`.

    Args:
        config: The run config.
        take_held_out: Whether the shard belongs to the held-out split.
        source: Where its rows are.
        part: Which of them.
        key: Of the shard, as the driver has it.

    Raises:
        DataError: A row that cannot be used, or the data has changed.
    """
    parsed = config_from_dict(config)
    render, render_key = make_renderer(parsed, load_tokenizer(parsed))
    train, held_out = split_requests(parsed, render_key)
    request = held_out if take_held_out else train[0]
    assert request is not None
    rows, which = SourceConfig(**source), Part.from_dict(part)
    if request.part_key(rows, which) != key:
        raise DataError("this machine has another tokenizer or chat template than the driver; give all the same files")
    return asdict(make_shard(request, rows, which, render, open_store(cache_address(parsed))))

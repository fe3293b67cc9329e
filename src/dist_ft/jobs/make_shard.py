"""Makes one token shard. The Ray tasks that prepare data run this job."""

from __future__ import annotations

from typing import Any

from dist_ft.config import Config
from dist_ft.data.shards.make import cache_errors, make_shard
from dist_ft.data.shards.request import PlannedShard
from dist_ft.errors import DataError
from dist_ft.jobs.curate import nothing_removed
from dist_ft.jobs.splits import cache_address, make_renderer, split_requests, with_fraction
from dist_ft.model.base import load_tokenizer
from dist_ft.storage.objects import open_store


def run(config: Config, take_held_out: bool, shard: dict[str, Any]) -> dict[str, Any]:
    """Make a shard and return its `ShardInfo` as JSON values.

    Args:
        config: The run config.
        take_held_out: Whether the shard belongs to the held-out fraction.
        shard: A `PlannedShard` as JSON values.

    Raises:
        DataError: A row cannot be used, or the data has changed.
        ConfigError: The store refuses the shard.
    """
    config = with_fraction(config)
    planned = PlannedShard.from_dict(shard)
    render_many, render_key = make_renderer(config, load_tokenizer(config))
    train, held_out = split_requests(config, render_key, nothing_removed(config))
    request = held_out if take_held_out else train[0]  # which differ in their sources alone
    assert request is not None
    if request.part_key(planned.source, planned.part, planned.removed) != planned.key:
        raise DataError("this machine has another tokenizer or chat template than the driver; give all the same files")
    address = cache_address(config)
    with cache_errors(address):
        return make_shard(request, planned, render_many, open_store(address)).to_dict()

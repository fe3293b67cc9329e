"""Checks model and data and makes token shards: what must be right before any process group exists."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from dist_ft.checkpoint.manifest import Fingerprint
from dist_ft.config import Config, config_from_dict
from dist_ft.data.shards.make import RenderMany, cache_errors, check_bad_rows, make_shard, read_infos
from dist_ft.data.shards.request import PlannedShard, SplitPlan, plan_split
from dist_ft.data.shards.split import PreparedSplit, complete_split, missing_shards, open_ended_split
from dist_ft.data.stream.mixing import epoch_size
from dist_ft.data.stream.order import WINDOW_SHARDS, first_pass, run_length
from dist_ft.errors import ConfigError
from dist_ft.jobs.curate import nothing_removed
from dist_ft.jobs.splits import cache_address, make_renderer, plan_splits, split_requests
from dist_ft.model.adapter import adapter_hash
from dist_ft.model.base import at_commit, fingerprint, load_model_config, load_tokenizer, skeleton
from dist_ft.model.dropout import check_dropout
from dist_ft.model.trained import select_trained
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import Store

_SMALL_SHARE = 0.25
"""Of a part: so much is made by whoever asks."""


def run(config: dict[str, Any], makes_all: bool = True) -> dict[str, Any]:
    """Checks model and data and makes the token shards that are missing.

    Args:
        config: The run config, as JSON values.
        makes_all: Make every shard here; else only if they are so few that other processes would take longer.

    Returns:
        Either `missing`, the arguments of `tasks.make_shard` (but the config) for each shard to make first, or
        an empty `missing`, the number of shards made here as `num_made`, and the fields of
        `coordinator.core.Prepared`. Besides, `files`: what the sources are made
        of; `to_stream`: in mode `stream`, the shards to make while training goes on, in the order in which it needs
        them, and what is there; `commit`: of the model.

    Raises:
        UserError: Of the kind that says what is wrong.
    """
    parsed = at_commit(config_from_dict(config))
    check_model(parsed)
    with cache_errors(cache_address(parsed)):
        return _prepare(parsed, makes_all)


def _prepare(parsed: Config, makes_all: bool) -> dict[str, Any]:
    render_many, render_key = make_renderer(parsed, load_tokenizer(parsed))
    train, held_out = plan_splits(parsed, render_key)
    store = open_store(cache_address(parsed))
    is_stream = parsed.data.preparation == "stream"
    wanted = [*([] if is_stream else train), *([held_out] if held_out else [])]
    missing = [_Job(plan, shard) for plan, shard in missing_shards(wanted, store)]
    found: dict[str, Any] = {
        "files": [[file.to_dict() for file in plan.files] for plan in train],
        "commit": parsed.model.commit,
    }
    few = parsed.data.part_bytes * _SMALL_SHARE
    if not makes_all and sum(job.shard.part.size for job in missing) > few:
        return {"missing": [job.to_dict() for job in missing], **found}
    found["num_made"] = len(missing)
    for job in missing:
        make_shard(job.plan.request, job.shard, render_many, store)
    splits, eval_split = _finish(parsed, train, held_out, store)
    max_steps, num_positions = plan_length(parsed, [split.num_sequences for split in splits])
    return {
        "missing": [],
        "to_stream": _to_stream(parsed, train, store) if is_stream else None,
        "splits": [asdict(split) for split in splits],
        "eval_split": asdict(eval_split) if eval_split else None,
        "fingerprint": asdict(make_fingerprint(parsed, splits)),
        "max_steps": max_steps,
        "num_positions": num_positions,
        **found,
    }


@dataclass(frozen=True)
class _Job:
    """A shard to make, the split that it belongs to, and (source, window) of its place in the order of `stream`."""

    plan: SplitPlan
    shard: PlannedShard
    place: tuple[int, int] = (0, 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments of `tasks.make_shard.run` but for the config, and what the driver wants to know."""
        arguments = {"take_held_out": self.plan.request.take_held_out, "shard": self.shard.to_dict()}
        return {"arguments": arguments, "num_bytes": self.shard.part.size, "place": self.place}


def prepare_held_out(config: Config, tokenizer: Any) -> PreparedSplit | None:
    """Prepares the held-out rows alone; None when there are none."""
    render_many, render_key = make_renderer(config, tokenizer)
    request = split_requests(config, render_key, nothing_removed(config))[1]
    return prepare_split(config, plan_split(request), render_many) if request else None


def prepare_split(config: Config, plan: SplitPlan, render_many: RenderMany) -> PreparedSplit:
    """Makes what is missing of a split, one shard after the other."""
    store = open_store(cache_address(config))
    for _, shard in missing_shards([plan], store):
        make_shard(plan.request, shard, render_many, store)
    return complete_split(plan, store, cache_address(config))


def _finish(
    config: Config, train: list[SplitPlan], held_out: SplitPlan | None, store: Store
) -> tuple[list[PreparedSplit], PreparedSplit | None]:
    address = cache_address(config)
    finish = open_ended_split if config.data.preparation == "stream" else complete_split
    splits = [finish(plan, store, address) for plan in train]
    return splits, complete_split(held_out, store, address) if held_out else None


def _to_stream(config: Config, train: list[SplitPlan], store: Store) -> dict[str, Any]:
    jobs, made = _in_order_of_need(config, train, store)
    return {"jobs": [job.to_dict() for job in jobs], "made": made}


def _in_order_of_need(config: Config, train: list[SplitPlan], store: Store) -> tuple[list[_Job], list[list[Any]]]:
    """Returns the missing shards as the stream reaches them (the first of each source, then the second of each), and
    (source, window, sequences) of those that are there."""
    needed, made = [], []
    missing = {shard.key for _, shard in missing_shards(train, store)}
    for source, plan in enumerate(train):
        there = list(dict.fromkeys(shard.key for shard in plan.shards if shard.key not in missing))
        infos = {info.key: info for info in read_infos(store, there)}
        order = first_pass(len(plan.shards), config.run.seed, source, config.data.shuffle)
        weight = (config.data.weights or [1.0] * len(train))[source]
        for index_in_pass, index in enumerate(order):
            shard, window = plan.shards[index], index_in_pass // WINDOW_SHARDS
            if shard.key in missing:
                needed.append((index_in_pass / weight, source, _Job(plan, shard, (source, window))))
            else:
                check_bad_rows(plan.request, infos[shard.key], store)
                made.append([source, window, infos[shard.key].num_sequences])
    return [job for _, _, job in sorted(needed, key=lambda entry: entry[:2])], made


def plan_length(config: Config, num_sequences: list[int]) -> tuple[int, int]:
    """Returns (steps, positions) of a run on training sources of so many sequences."""
    epoch = epoch_size(num_sequences, config.data.weights, config.data.exhaust)
    return run_length(epoch, config.train.global_batch_size, config.train.epochs, config.train.max_steps)


def make_fingerprint(config: Config, splits: list[PreparedSplit]) -> Fingerprint:
    """Returns what checkpoints of this config belong to."""
    method = config.method.model_dump(mode="json")
    trained = method if config.method.kind == "lora" else {key: method[key] for key in ("kind", "freeze")}
    if config.method.init_from is not None:
        trained["init_from"] = adapter_hash(config.method.init_from)
    return Fingerprint(
        model=fingerprint(config),
        data=xxhash.xxh3_128_hexdigest(
            f"{[split.key for split in splits]} {config.data.weights} {config.data.shuffle}".encode()
        ),
        seed=config.run.seed,
        method=", ".join(f"{key}={value}" for key, value in trained.items()),
        global_batch_size=config.train.global_batch_size,
    )


def check_model(config: Config) -> None:
    """Checks the model's limits, and that the adapter fits its structure, without loading a weight.

    Raises:
        ConfigError: With both values.
    """
    # As an attribute: families spell the key differently and map it. Some say -1 for no limit.
    limit = getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < config.data.seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the model allows "
            f"(max_position_embeddings={limit} in the config of {config.model.name}); set data.seq_len <= {limit}"
        )
    model = skeleton(config)
    check_dropout(model)
    select_trained(model, config)

"""Checks model and data, and makes the token shards, before any process group exists."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from dist_ft.config import Config
from dist_ft.config.rules import quantisation_problems
from dist_ft.data.shards.make import RenderMany, cache_errors, check_bad_rows, make_shard, read_infos
from dist_ft.data.shards.request import PlannedShard, SplitPlan
from dist_ft.data.shards.split import PreparedSplit, complete_split, missing_shards, open_ended_split
from dist_ft.data.stream.mixing import epoch_size
from dist_ft.data.stream.order import WINDOW_SHARDS, first_pass, run_length
from dist_ft.errors import ConfigError
from dist_ft.jobs.score import check_scorer, missing_scores, scorer_key
from dist_ft.jobs.spec import MadeShard, MissingShards, Preparation, ShardJob, StreamedShards, Window
from dist_ft.jobs.splits import cache_address, make_renderer, plan_held_out, plan_splits, with_fraction
from dist_ft.model.adapter import adapter_hash
from dist_ft.model.attention import check_apart
from dist_ft.model.base import (
    Tokenizer,
    at_commit,
    check_length,
    check_weights,
    fingerprint,
    load_tokenizer,
    quantisation_of,
    skeleton,
)
from dist_ft.model.dropout import check_dropout
from dist_ft.model.exported import rehearse_export
from dist_ft.model.trained import select_trained, trains_adapter
from dist_ft.objectives.kinds import build_objective
from dist_ft.run.run_inputs import RunInputs
from dist_ft.slices import Fingerprint
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import Store
from dist_ft.zero.optimizers import optimizer_of

_SMALL_SHARE = 0.25
"""Share of a part: missing shards of so few bytes in all are made by the process that lists the sources."""


def run(config: Config, makes_all: bool = True) -> dict[str, Any]:
    """Prepare the data of a run in a process of its own.

    Args:
        config: The run config.
        makes_all: Whether to call `prepare`; otherwise `prepare_or_list`.

    Returns:
        JSON values that `spec.decode_preparation` reads.
    """
    return (prepare(config) if makes_all else prepare_or_list(config)).to_dict()


def prepare(config: Config) -> Preparation:
    """Check model and data, and make the token shards that are missing.

    Raises:
        UserError: Bad input; the class and the message say what is wrong.
    """
    found = _prepare(config, makes_all=True)
    assert isinstance(found, Preparation)  # no shard is left
    return found


def prepare_or_list(config: Config) -> Preparation | MissingShards:
    """Works like `prepare`, but only lists the shards if other processes can make them faster.

    Raises:
        UserError: Bad input; the class and the message say what is wrong.
    """
    return _prepare(config, makes_all=False)


def _prepare(config: Config, makes_all: bool) -> Preparation | MissingShards:
    config = at_commit(config)
    check_model(config)
    scorer = build_objective(config.objective).scorer
    if scorer is not None:
        check_scorer(config, scorer)
    score_key = scorer_key(config, scorer) if scorer else ""
    address = cache_address(config)
    with cache_errors(address):
        render_many, render_key = make_renderer(config, load_tokenizer(config))
        train, held_out = plan_splits(with_fraction(config), render_key)
        store = open_store(address)
        is_stream = config.data.preparation == "stream"
        every = [*train, *([held_out.whole] if held_out else [])]
        wanted = every[len(train) if is_stream else 0 :]
        missing = missing_shards(wanted, store)
        files = tuple(plan.files for plan in train)
        few = config.data.part_bytes * _SMALL_SHARE
        if not makes_all and sum(shard.part.size for _, shard in missing) > few:
            return MissingShards(
                tuple(_job(plan, shard, Window(0, 0)) for plan, shard in missing), files, config.model.commit
            )
        for plan, shard in missing:
            make_shard(plan.request, shard, render_many, store)
        to_stream = None
        unscored = missing_scores(every, store, score_key) if score_key else set()
        if is_stream:
            made = _read_made(train, store)
            splits = tuple(
                open_ended_split(plan, store, address, sizes) for plan, sizes in zip(train, made, strict=True)
            )
            to_stream = _shards_to_stream(config, train, made, score_key, unscored)
            max_steps, num_positions = plan_length(config, None)
        else:
            splits = tuple(complete_split(plan, store, address) for plan in train)
            max_steps, num_positions = plan_length(config, [split.known_counts.num_sequences for split in splits])
        eval_split = complete_split(held_out.whole, store, address) if held_out else None
        eval_sets = (
            {name: complete_split(plan, store, address) for name, plan in held_out.sets.items()} if held_out else {}
        )
        mark = make_fingerprint(config, splits, score_key)
        splits = tuple(replace(split, score_key=score_key) for split in splits)
        eval_split = replace(eval_split, score_key=score_key) if eval_split else None
        eval_sets = {name: replace(split, score_key=score_key) for name, split in eval_sets.items()}
        return Preparation(
            RunInputs(splits, eval_split, mark, max_steps, num_positions, config.model.commit, eval_sets),
            files,
            num_made=len(missing),
            to_stream=to_stream,
            to_score=_shards_to_score(wanted, unscored, score_key),
        )


def _job(plan: SplitPlan, shard: PlannedShard, window: Window, place: int = 0, score_key: str = "") -> ShardJob:
    return ShardJob(plan.request.take_held_out, shard.to_dict(), shard.part.size, window, place, score_key)


def _shards_to_score(plans: Sequence[SplitPlan], unscored: Collection[str], score_key: str) -> tuple[ShardJob, ...]:
    """Return the shards without scores, plan by plan in file order."""
    by_key = {shard.key: (plan, shard) for plan in plans for shard in plan.shards if shard.key in unscored}
    return tuple(_job(plan, shard, Window(0, 0), score_key=score_key) for plan, shard in by_key.values())


def prepare_held_out(config: Config, tokenizer: Tokenizer) -> dict[str, PreparedSplit]:
    """Prepare only the held-out rows; return the sets as `RunInputs.measured_sets` does."""
    render_many, render_key = make_renderer(config, tokenizer)
    held_out = plan_held_out(config, render_key)
    sets = (held_out.sets or {"": held_out.whole}) if held_out else {}
    return {name: prepare_split(config, plan, render_many) for name, plan in sets.items()}


def prepare_split(config: Config, plan: SplitPlan, render_many: RenderMany) -> PreparedSplit:
    """Make the missing shards of a split, one after the other."""
    store = open_store(cache_address(config))
    for _, shard in missing_shards([plan], store):
        make_shard(plan.request, shard, render_many, store)
    return complete_split(plan, store, cache_address(config))


def _read_made(train: Sequence[SplitPlan], store: Store) -> list[dict[str, int]]:
    """Return for each split the number of sequences of each shard that exists, by key."""
    missing = {shard.key for _, shard in missing_shards(train, store)}
    made = []
    for plan in train:
        infos = read_infos(store, list(dict.fromkeys(shard.key for shard in plan.shards if shard.key not in missing)))
        for info in infos:
            check_bad_rows(plan.request, info, store)
        made.append({info.key: info.counts.num_sequences for info in infos})
    return made


def _shards_to_stream(
    config: Config,
    train: Sequence[SplitPlan],
    made_sizes: Sequence[Mapping[str, int]],
    score_key: str,
    unscored: Collection[str],
) -> StreamedShards:
    """Return the shards of a streamed run in the order in which the stream reaches them.

    These are the first shard of each source, then the second of each, and so on; a source with twice the weight comes
    twice as often.
    """
    needed, made = [], []
    for source, (plan, sizes) in enumerate(zip(train, made_sizes, strict=True)):
        order = first_pass(len(plan.shards), config.run.seed, source, config.data.shuffle)
        weight = (config.data.weights or [1.0] * len(train))[source]
        for index_in_pass, index in enumerate(order):
            shard, window = plan.shards[index], Window(source, index_in_pass // WINDOW_SHARDS)
            if shard.key in sizes and shard.key not in unscored:
                made.append(MadeShard(window, sizes[shard.key]))
            else:
                needed.append((index_in_pass / weight, source, _job(plan, shard, window, index, score_key)))
    needed.sort(key=lambda entry: entry[:2])
    return StreamedShards(tuple(job for _, _, job in needed), tuple(made))


def plan_length(config: Config, num_sequences: Sequence[int] | None) -> tuple[int, int]:
    """Return the steps and positions of a run.

    Args:
        config: The run config.
        num_sequences: Sequences of each training source; None if they are not known.
    """
    epoch = None
    if num_sequences is not None:
        epoch = epoch_size(num_sequences, config.data.weights, config.data.exhaust)
    return run_length(epoch, config.train.global_batch_size, config.train.epochs, config.train.max_steps)


def make_fingerprint(config: Config, splits: Sequence[PreparedSplit], score_key: str = "") -> Fingerprint:
    """Return the fingerprint of this config's checkpoints.

    Args:
        config: The run config.
        splits: The training sources.
        score_key: Key of the frozen model, which the objective's section only names.
    """
    settings = config.objective.model_dump(mode="json", exclude={"kind", "reference", "teacher", "teacher_revision"})
    scored = [f"scores={score_key}"] if score_key else []
    method = config.method.model_dump(mode="json")
    trained = method if trains_adapter(config) else {key: method[key] for key in ("kind", "freeze")}
    del method["neftune_alpha"]  # checkpoints without it are older than the key
    if config.method.neftune_alpha is not None:
        trained["neftune_alpha"] = config.method.neftune_alpha
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
        objective=", ".join([config.objective.kind, *(f"{key}={value}" for key, value in settings.items()), *scored]),
        optimizer=optimizer_of(config.optimizer).fingerprint,
    )


def check_model(config: Config) -> None:
    """Check that the model would load, its limits, that the adapter fits it and that rows may be packed.

    No weight is loaded.

    Raises:
        ModelError: The model would not load, draws dropout that depends on the layout, or does not keep packed samples
            apart.
        ConfigError: A limit is exceeded, the adapter does not fit, or the base is quantised where it cannot be; the
            message has both values.
    """
    check_length(config)
    if config.model.quantization is None and (quantised := quantisation_of(config)) is not None:
        where = f"model.name={config.model.name}, whose files are quantised ({quantised.kind}),"
        if problems := quantisation_problems(config, where):
            raise ConfigError("\n".join(problems))
    model = skeleton(config)
    check_weights(config)
    rehearse_export(config)
    check_dropout(model)
    select_trained(model, config)
    if config.data.packing:
        check_apart(model)

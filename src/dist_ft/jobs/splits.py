"""Derives from a config the splits of a run and the renderer of its rows. Prepares nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_ft.config import Config
from dist_ft.data.curation.filters import Curation
from dist_ft.data.curation.personal import PATTERNS_VERSION, redact
from dist_ft.data.rows import held_out_count
from dist_ft.data.shards.make import RenderMany
from dist_ft.data.shards.request import SplitPlan, SplitRequest, plan_split
from dist_ft.data.sources.listing import ListedSources, list_sources
from dist_ft.errors import DataError
from dist_ft.jobs.curate import curate, nothing_removed
from dist_ft.model.base import (
    Tokenizer,
    load_generation_config,
    load_model_config,
    num_embedding_rows,
    stop_tokens,
    tokenizer_key,
)
from dist_ft.model.chat.render import RENDERING_VERSION, Renderer
from dist_ft.objectives.kinds import build_objective
from dist_ft.records import Record, Sample
from dist_ft.storage.objects import open_store
from dist_ft.storage.urls import is_url

CACHE_NAME = ".dist-ft-cache"
"""Folder of prepared data in `run.output_dir`, which all machines see."""


def make_renderer(config: Config, tokenizer: Tokenizer) -> tuple[RenderMany, str]:
    """Return the function that turns rows into tokens, and a key of all settings that it depends on."""
    train_on, kinds = config.data.train_on, sorted(config.data.redact)
    objective = build_objective(config.objective)
    renderer = Renderer(tokenizer, train_on, stop_tokens(tokenizer, load_generation_config(config)))
    key = f"{tokenizer_key(tokenizer)} {train_on} {RENDERING_VERSION}{renderer.endings_key}{objective.render_key}"

    num_rows = _rows_that_are_too_few(config, tokenizer)
    key += f" of {num_rows} tokens" if num_rows else ""

    def render_many(records: Sequence[Record]) -> list[list[Sample] | DataError]:
        found = objective.render([redact(record, kinds) for record in records], renderer)
        if num_rows is None:
            return found
        return [outcome if isinstance(outcome, DataError) else _with_rows(outcome, num_rows) for outcome in found]

    def _with_rows(samples: list[Sample], limit: int) -> list[Sample] | DataError:
        highest = max((max(sample.input_ids, default=0) for sample in samples), default=0)
        if highest < limit:
            return samples
        return DataError(
            f"token {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, and the embedding of "
            f"model.name={config.model.name} has {limit} rows; use the tokenizer that the model was trained with, or "
            "give the model more rows (resize_token_embeddings) and save it"
        )

    return render_many, f"{key} redact {kinds} {PATTERNS_VERSION}" if kinds else key


def _rows_that_are_too_few(config: Config, tokenizer: Tokenizer) -> int | None:
    """Return the rows of the embedding if the tokenizer has tokens without one; such tokens may never be used."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest < int(load_model_config(config).get_text_config().vocab_size):
        return None
    num_rows = num_embedding_rows(config)
    return num_rows if highest >= num_rows else None


@dataclass(frozen=True)
class HeldOutPlan:
    """Holds the plans of the held-out data.

    Attributes:
        whole: All held-out rows.
        sets: The held-out sets by name, whose shards are those of `whole`; none where `data.eval` names none.
    """

    whole: SplitPlan
    sets: Mapping[str, SplitPlan]


def with_fraction(config: Config) -> Config:
    """Return the config with a fraction in place of a number of held-out rows; see `data/rows/held_out_count.py`."""
    data = held_out_count.with_fraction(config.data, open_store(cache_address(config)))
    return config.model_copy(update={"data": data})


def plan_splits(config: Config, render_key: str) -> tuple[list[SplitPlan], HeldOutPlan | None]:
    """List each source once, and return the plan of each training source and of the held-out data."""
    listed = list_sources(config.data)
    train, held_out = split_requests(config, render_key, curate(config, listed, open_store(cache_address(config))))
    plans = [plan_split(request, [files]) for request, files in zip(train, listed.train, strict=True)]
    return plans, _plan_held_out(config, held_out, listed) if held_out else None


def plan_held_out(config: Config, render_key: str) -> HeldOutPlan | None:
    """Return the plan of the held-out data; None where there is none. No rule of `data.curation` changes it."""
    held_out = split_requests(config, render_key, nothing_removed(config))[1]
    return _plan_held_out(config, held_out, list_sources(config.data)) if held_out else None


def _plan_held_out(config: Config, held_out: SplitRequest, listed: ListedSources) -> HeldOutPlan:
    sets = zip(config.data.eval_names, held_out.sources, listed.held_out, strict=False)
    return HeldOutPlan(
        plan_split(held_out, listed.held_out or listed.train),
        {name: plan_split(replace(held_out, sources=(source,)), [files]) for name, source, files in sets},
    )


def split_requests(
    config: Config, render_key: str, curation: Curation
) -> tuple[list[SplitRequest], SplitRequest | None]:
    """Return the request of each training source and of the held-out data."""
    data, objective = config.data, build_objective(config.objective)
    common = SplitRequest(
        sources=(),
        seq_len=data.seq_len,
        packing=data.packing,
        render_key=render_key,
        held_out=data.eval_fraction or 0.0,
        group_by=data.group_by,
        long_samples=data.long_samples,
        bad_rows=data.bad_rows,
        part_bytes=data.part_bytes,
        rows_per_slot=objective.rows_per_slot,
        columns=objective.columns,
        adds_mismatched=objective.adds_mismatched,
    )
    train = [
        replace(common, sources=(source,), removed=removed)
        for source, removed in zip(data.train, curation.sources, strict=True)
    ]
    if data.eval_sources:
        return train, replace(common, sources=tuple(data.eval_sources.values()))
    return train, replace(common, sources=tuple(data.train), take_held_out=True) if data.eval_fraction else None


def cache_address(config: Config) -> str:
    """Return the path or URL of the token shards, which all machines see."""
    address = config.data.cache_dir or f"{config.run.output_dir}/{CACHE_NAME}/data"
    return address if is_url(address) else str(Path(address).expanduser().absolute())

"""Shows sequences of a run's prepared data as text, token by token, with the rows that they come from.

The tokens are those of the token shards that a run would use. `report/data_text.py` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dist_ft.config import Config
from dist_ft.data.shards.make import RenderMany, render_rows, usable
from dist_ft.data.shards.request import PlannedShard, SplitRequest, rows_of_shard
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.errors import UsageError
from dist_ft.jobs.data_report.summary import Segment, ShownData, ShownSample, ShownSequence
from dist_ft.jobs.prepare import prepare_split
from dist_ft.jobs.splits import make_renderer, plan_splits, with_fraction
from dist_ft.model.base import Tokenizer, load_tokenizer
from dist_ft.objectives.kinds import build_objective

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Origin:
    place: str
    num_cut_tokens: int


def show_data(config: Config, source: str, first: int, count: int) -> ShownData:
    """Prepare the data as a run does, and return some sequences.

    Args:
        source: Index of a training source, as in `data.train.0`, `eval`, or `eval.NAME` for a held-out set.
        first: First sequence, counted from 1.
        count: Sequences to show; fewer at the end of the split.

    Raises:
        UserError: The data cannot be prepared, or has no such source or sequence.
    """
    config = with_fraction(config)
    tokenizer = load_tokenizer(config)
    render_many, render_key = make_renderer(config, tokenizer)
    train, held_out = plan_splits(config, render_key)
    plans = {str(index): plan for index, plan in enumerate(train)}
    if held_out is not None:
        plans |= {"eval": held_out.whole} | {f"eval.{name}": plan for name, plan in held_out.sets.items()}
    if source not in plans:
        raise UsageError(f"--source {source}: this config has {', '.join(plans)}")
    plan = plans[source]
    split = prepare_split(config, plan, render_many)
    counts = split.known_counts
    if first > counts.num_sequences:
        raise UsageError(f"--row {first}: source {source} has {counts.num_sequences:,} sequences")
    shards = open_split(split, config.data.loader)
    rows = range(first - 1, min(first - 1 + count, counts.num_sequences))
    places = [_locate(shards, row) for row in rows]
    names = build_objective(config.objective).sample_names
    sequences: list[list[tuple[list[int], list[bool], dict[str, float]]]] = []
    for shard, row in places:
        ids, trained, starts, numbers = shards.read(shard, row)
        of_samples = [{name: float(values[at]) for name, values in numbers.items()} for at in range(len(starts))]
        cuts = zip(starts, [*starts[1:], len(ids)], of_samples, strict=True)
        sequences.append([(ids[start:end].tolist(), trained[start:end].tolist(), of) for start, end, of in cuts])
    wanted = {tuple(ids) for samples in sequences for ids, _, _ in samples}
    parts = [plan.shards[shard] for shard in dict.fromkeys(shard for shard, _ in places)]
    origins = _find_origins(plan.request, parts, render_many, wanted)
    shown = []
    for number, pieces in zip(rows, sequences, strict=True):
        samples = []
        place, num_cut = None, None
        for index, (tokens, flags, of_sample) in enumerate(pieces):
            role = names[index % len(names)] if names else ""
            origin = origins.get(tuple(tokens))
            if origin is not None or not index % max(1, len(names)):  # a mismatched answer is beside its own row
                place, num_cut = (origin.place, origin.num_cut_tokens) if origin else (None, None)
            segments = list(_segments(tokenizer, tokens, flags))
            samples.append(ShownSample(place, num_cut, tokens, flags, segments, role, of_sample))
        shown.append(ShownSequence(number + 1, samples))
    return ShownData(
        source=plan.request.shown,
        split=source if source.startswith("eval") else f"train.{source}",
        seq_len=config.data.seq_len,
        num_rows=counts.num_rows,
        num_sequences=counts.num_sequences,
        num_tokens=counts.num_tokens,
        num_trained_tokens=counts.num_trained_tokens,
        sequences=shown,
    )


def _locate(shards: TokenShards, row: int) -> tuple[int, int]:
    """Return the shard of a sequence of the split, and the row in the shard."""
    for shard, size in enumerate(shards.num_sequences(np.arange(shards.num_shards)).tolist()):
        if row < size:
            return shard, row
        row -= size
    raise AssertionError(f"row {row} is beyond the split")


def _find_origins(
    request: SplitRequest, parts: Sequence[PlannedShard], render_many: RenderMany, wanted: set[Tokens]
) -> dict[Tokens, _Origin]:
    """Render the rows of the shards again to find the row of each sample, which shards do not record.

    If several rows have the same tokens, the first one is named.
    """
    found: dict[Tokens, _Origin] = {}
    for part in parts:
        for row, samples in render_rows(rows_of_shard(request, part), render_many):
            for sample in samples if isinstance(samples, list) else ():  # a row that is left out has none
                for piece in usable(sample, request):
                    num_cut = 0 if request.long_samples == "split" else len(sample.input_ids) - len(piece.input_ids)
                    if (tokens := tuple(piece.input_ids)) in wanted:
                        found.setdefault(tokens, _Origin(row.place, num_cut))
                if len(found) == len(wanted):
                    return found
    return found


def _segments(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> Iterator[Segment]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(is_trained, token in special) for token, is_trained in zip(ids, trained, strict=True)]
    start = 0
    for (is_trained, is_special), members in groupby(kinds):
        end = start + len(list(members))
        # Decode together with the token before it, because some tokenizers drop the first space of a text.
        before = _decode(tokenizer, ids[max(0, start - 1) : start])
        text = _decode(tokenizer, ids[max(0, start - 1) : end])
        text = text.removeprefix(before) if text.startswith(before) else _decode(tokenizer, ids[start:end])
        yield Segment(text, end - start, is_trained, is_special)
        start = end


def _decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

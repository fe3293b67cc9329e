"""What the model is fed: sequences of a run's prepared data, token by token, with where they come from.

Owns reading them back as text. The tokens are those of the token shards; nothing is prepared in another way. How it
looks is `plan/data_text.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np

from dist_ft.config import Config
from dist_ft.errors import UsageError
from dist_ft.model.base import load_tokenizer
from dist_ft.model.render import Renderer
from dist_ft.stream.cache import WINDOW_ROWS, SplitRequest, render_row, rows_of_side, usable
from dist_ft.stream.shards import TokenShards
from dist_ft.stream.sources import Row
from dist_ft.tasks.prepare import make_renderer, prepare_splits, split_requests

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind, as text."""

    text: str
    num_tokens: int
    is_trained: bool
    is_special: bool


@dataclass(frozen=True)
class ShownSample:
    """One sample of a sequence.

    Attributes:
        place: `file:line` that it comes from; None when its row is not found again.
        num_cut_tokens: Tokens that the cut at `data.seq_len` left out; None when its row is not found again.
        input_ids: Its tokens.
        trained: For each token, whether its prediction is trained.
        segments: The same as text.
    """

    place: str | None
    num_cut_tokens: int | None
    input_ids: list[int]
    trained: list[bool]
    segments: list[Segment]


@dataclass(frozen=True)
class _Origin:
    place: str
    num_cut_tokens: int


def show_data(config: Config, source: str, first: int, count: int) -> dict[str, Any]:
    """Prepares the data as a run does and returns some sequences, as JSON values.

    Args:
        source: Index of a training source, as in `data.train.0`, or `eval`.
        first: First sequence, counted from 1.
        count: Sequences to show; fewer where the split ends.

    Raises:
        UserError: The data cannot be prepared, or has no such source or sequence.
    """
    tokenizer = load_tokenizer(config)
    render, render_key = make_renderer(config, tokenizer)
    request = _choose(split_requests(config, render_key), source)
    splits, eval_split = prepare_splits(config, tokenizer)
    split = eval_split if source == "eval" else splits[int(source)]
    assert split is not None
    if first > split.num_sequences:
        raise UsageError(f"--row {first}: source {source} has {split.num_sequences:,} sequences")
    shards = split.open()
    rows = range(first - 1, min(first - 1 + count, split.num_sequences))
    sequences = [list(_samples(shards, row)) for row in rows]
    wanted = {tuple(ids) for samples in sequences for ids, _ in samples}
    origins = _find_origins(request, render, wanted, _first_row(shards, rows))
    shown = [[_show(tokenizer, ids, trained, origins) for ids, trained in samples] for samples in sequences]
    return {
        "source": request.shown,
        "split": "eval" if source == "eval" else f"train.{source}",
        "seq_len": config.data.seq_len,
        "num_rows": split.num_rows,
        "num_sequences": split.num_sequences,
        "num_tokens": split.num_tokens,
        "num_trained_tokens": split.num_trained_tokens,
        "sequences": [
            {"row": row + 1, "samples": [asdict(sample) for sample in samples]}
            for row, samples in zip(rows, shown, strict=True)
        ],
    }


def _choose(requests: tuple[list[SplitRequest], SplitRequest | None], source: str) -> SplitRequest:
    train, held_out = requests
    known = {str(index): request for index, request in enumerate(train)}
    if held_out is not None:
        known["eval"] = held_out
    if source not in known:
        raise UsageError(f"--source {source}: this config has {', '.join(known)}")
    return known[source]


def _samples(shards: TokenShards, row: int) -> Iterator[tuple[list[int], list[bool]]]:
    shard, offset = _place(shards, row)
    ids, trained, starts = shards.read(shard, offset)
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield ids[start:end].tolist(), trained[start:end].tolist()


def _first_row(shards: TokenShards, rows: range) -> int:
    """Returns a row of the split before which none of these sequences has its rows: a token shard is one window."""
    return WINDOW_ROWS * _place(shards, rows.start)[0]


def _place(shards: TokenShards, row: int) -> tuple[int, int]:
    """Returns the shard of a row of the split, and the row in it."""
    ends = np.cumsum(shards.num_sequences(np.arange(shards.num_shards)))
    shard = int(np.searchsorted(ends, row, side="right"))
    return shard, row - int(ends[shard - 1] if shard else 0)


def _find_origins(request: SplitRequest, render: Renderer, wanted: set[Tokens], first: int) -> dict[Tokens, _Origin]:
    """Renders rows again until each sample has been seen: shards do not say where a sample comes from.

    Rows with the same tokens are told apart by nothing; the first one is named.
    """
    found: dict[Tokens, _Origin] = {}
    rows = (row for row in rows_of_side(request) if isinstance(row, Row))
    for tokens, origin in _pieces(request, render, islice(rows, first, None)):
        if tokens in wanted:
            found.setdefault(tokens, origin)
        if len(found) == len(wanted):
            break
    return found


def _pieces(request: SplitRequest, render: Renderer, rows: Iterable[Row]) -> Iterator[tuple[Tokens, _Origin]]:
    for row in rows:
        samples = render_row(row, render)
        for sample in samples if isinstance(samples, list) else ():  # a row that is left out has none
            for piece in usable(sample, request):
                num_cut = 0 if request.long_samples == "split" else len(sample.input_ids) - len(piece.input_ids)
                yield tuple(piece.input_ids), _Origin(row.place, num_cut)


def _show(tokenizer: Any, ids: list[int], trained: list[bool], origins: dict[Tokens, _Origin]) -> ShownSample:
    origin = origins.get(tuple(ids))
    return ShownSample(
        place=origin.place if origin else None,
        num_cut_tokens=origin.num_cut_tokens if origin else None,
        input_ids=ids,
        trained=trained,
        segments=list(_segments(tokenizer, ids, trained)),
    )


def _segments(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> Iterator[Segment]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(is_trained, token in special) for token, is_trained in zip(ids, trained, strict=True)]
    start = 0
    for (is_trained, is_special), members in groupby(kinds):
        end = start + len(list(members))
        yield Segment(_text(tokenizer, ids, start, end), end - start, is_trained, is_special)
        start = end


def _text(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """Decodes a part behind the token before it: some tokenizers drop the space that a text begins with."""
    before = _decode(tokenizer, ids[max(0, start - 1) : start])
    whole = _decode(tokenizer, ids[max(0, start - 1) : end])
    return whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

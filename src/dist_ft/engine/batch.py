"""The rows that are answered together. Rows join and leave between two steps.

Legend: R rows, W places, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLMatcher

from dist_ft.engine.protocol import Ask, Chosen, Piece, Refused
from dist_ft.engine.rendered import Rendering
from dist_ft.engine.sampling import Draw, choose
from dist_ft.engine.transcript import Transcript
from dist_ft.model.batch.rows_cache import RowsCache
from dist_ft.model.batch.served import ServedModel

_TOO_COMPLEX = "The JSON schema is too complex for this answer; simplify it."


@dataclass
class Row:
    """An answer in the making.

    Attributes:
        ask: The request.
        choice: Number of the answer in it.
        limit: Most tokens.
        transcript: Its text.
        matcher: What allows its tokens, if a grammar does.
        length: Places that it takes, prompt included.
        counts: Its tokens.
        told: Chosen tokens that no piece has told yet.
        last: Its newest token.
    """

    ask: Ask
    choice: int
    limit: int
    transcript: Transcript
    matcher: LLMatcher | None
    length: int
    counts: Counter[int] = field(default_factory=Counter)
    told: list[Chosen] = field(default_factory=list)
    last: int = -1

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.counts.total()


class Batch:
    """Rows, their cache and its mask.

    Args:
        model: Answers.
        rendering: Its tokens.
    """

    def __init__(self, model: ServedModel, rendering: Rendering) -> None:
        self._model, self._rendering = model, rendering
        self.rows: list[Row] = []
        self._cache = RowsCache(model.config)
        self._mask_RW = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def join(self, requests: Sequence[tuple[list[int], list[Row]]]) -> list[Piece | Refused]:
        """Read prompts together, each once for all its rows, and choose the first tokens of the rows.

        Args:
            requests: Prompt and new rows of each.

        Returns:
            The first pieces; rows that ended at once have not joined.
        """
        prompts = [tokens for tokens, _ in requests]
        longest = max(map(len, prompts))
        device, cache = self._model.device, RowsCache(self._model.config)
        # What stands in padding is masked.
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = self._mask([len(prompt) for prompt in prompts], longest)
        logits = self._model(ids, mask, cache, [rows[0].ask.adapter for _, rows in requests])
        rows = [row for _, rows in requests for row in rows]
        prompt_of = [number for number, (_, own) in enumerate(requests) for _ in own]
        pieces, ended = self._advance(rows, logits[prompt_of])
        kept = [number for number, is_over in enumerate(ended) if not is_over]
        if kept:
            new = [rows[number] for number in kept]
            width = max(row.length - 1 for row in [*self.rows, *new])
            old = [(self._cache, range(len(self.rows)))] if self.rows else []
            joined = RowsCache(self._model.config)
            joined.rebuild([*old, (cache, [prompt_of[number] for number in kept])], width)
            self._cache, self.rows = joined, [*self.rows, *new]
            self._rebuild_mask(width)
        return pieces

    def step(self) -> list[Piece | Refused]:
        """Choose one token of each row; rows that end leave."""
        ids_R1 = torch.tensor([[row.last] for row in self.rows], device=self._model.device)
        ones_R1 = torch.ones_like(ids_R1)
        self._mask_RW = torch.cat([self._mask_RW, ones_R1], -1)
        logits_RV = self._model(ids_R1, self._mask_RW, self._cache, [row.ask.adapter for row in self.rows])
        pieces, ended = self._advance(self.rows, logits_RV)
        self._keep([number for number, is_over in enumerate(ended) if not is_over])
        return pieces

    def drop(self, ask_id: str) -> None:
        """Take the rows of a request out."""
        self._keep([number for number, row in enumerate(self.rows) if row.ask.id != ask_id])

    def _keep(self, numbers: list[int]) -> None:
        if len(numbers) == len(self.rows):
            return
        rows = [self.rows[number] for number in numbers]
        cache = RowsCache(self._model.config)
        width = max((row.length - 1 for row in rows), default=0)
        if rows:
            cache.rebuild([(self._cache, numbers)], width)
        self._cache, self.rows = cache, rows
        self._rebuild_mask(width)

    def _rebuild_mask(self, width: int) -> None:
        # The newest token of a row is not in the cache yet.
        self._mask_RW = self._mask([row.length - 1 for row in self.rows], width)

    def _mask(self, lengths: Sequence[int], width: int) -> torch.Tensor:
        """Return the mask of rows that are aligned right."""
        lengths_R1 = torch.tensor(lengths, device=self._model.device).reshape(-1, 1)
        return (torch.arange(width, device=self._model.device) >= width - lengths_R1).long()

    def _advance(self, rows: list[Row], logits_RV: torch.Tensor) -> tuple[list[Piece | Refused], list[bool]]:
        """Choose the next token of each row; return the pieces to tell, and which rows are over."""
        # Probabilities are told before anything is changed.
        wanted = [number for number, row in enumerate(rows) if row.ask.sampling.logprobs is not None]
        log_probabilities = dict(zip(wanted, torch.log_softmax(logits_RV[wanted], -1), strict=True))
        _allow(rows, logits_RV)
        draws = [Draw(row.ask.sampling, row.choice, row.num_tokens, row.counts) for row in rows]
        pieces: list[Piece | Refused] = []
        ended = []
        for number, (row, token) in enumerate(zip(rows, choose(logits_RV, draws), strict=True)):
            is_end = token in self._rendering.stops
            if row.matcher is not None and not is_end:
                row.matcher.consume_token(token)
            row.last = token
            row.length += 1
            row.counts[token] += 1
            if number in log_probabilities and not is_end:
                row.told.append(self._chosen(log_probabilities[number], token, row.ask.sampling.logprobs or 0))
            if row.matcher is not None and row.matcher.is_error():
                pieces.append(Refused(row.ask.id, 400, _TOO_COMPLEX, "response_format"))
                ended.append(True)
                continue
            text = "" if is_end else row.transcript.push(token)
            finish = _finish(row, is_end)
            if finish is not None:
                text += row.transcript.finish()
            if text or finish is not None:
                pieces.append(Piece(row.ask.id, row.choice, text, row.num_tokens, tuple(row.told), finish))
                row.told = []
            ended.append(finish is not None)
        return pieces, ended

    def _chosen(self, log_probabilities_V: torch.Tensor, token: int, num_top: int) -> Chosen:
        likely = self._rendering.likely
        top = log_probabilities_V.topk(num_top)
        others = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Chosen(likely(token, float(log_probabilities_V[token])), tuple(likely(*other) for other in others))


def _finish(row: Row, is_end: bool) -> str | None:
    if is_end or row.transcript.is_stopped or (row.matcher is not None and row.matcher.is_stopped()):
        return "stop"
    return "length" if row.num_tokens >= row.limit else None


def _allow(rows: list[Row], logits_RV: torch.Tensor) -> None:
    """Leave to rows with a grammar only the tokens that it allows."""
    for number, row in enumerate(rows):
        if row.matcher is None:
            continue
        mask = np.frombuffer(row.matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: logits_RV.shape[-1]]
        logits_RV[number].masked_fill_(torch.from_numpy(bits == 0).to(logits_RV.device), float("-inf"))

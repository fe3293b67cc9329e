"""Chooses the next token of each row. Pure: the same logits, settings and step give the same token.

Legend: R rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from dist_ft.engine.protocol import Sampling

_COLDEST = 1e-5
"""Below this temperature the likeliest token is taken; dividing by less would overflow."""


@dataclass(frozen=True)
class Draw:
    """What a row's next token depends on besides its logits.

    Attributes:
        sampling: How it is drawn.
        choice: Number of the answer; answers of one request differ by it.
        step: Tokens of the answer so far.
        counts: How often the answer holds each token.
    """

    sampling: Sampling
    choice: int
    step: int
    counts: Counter[int]


def choose(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits_RV: Float32; changed in place.
        draws: One a row.
    """
    for row, draw in enumerate(draws):
        _adjust(logits_RV[row], draw)
    chosen: list[int] = logits_RV.argmax(-1).tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > _COLDEST:
            chosen[row] = _drawn(logits_RV[row], draw)
    return chosen


def uniform(seed: int, choice: int, step: int) -> float:
    """Return a number in [0, 1) that depends on its arguments only, not on who else is in the batch."""
    return (xxhash.xxh3_64_intdigest(f"{seed} {choice} {step}".encode()) >> 11) / 2.0**53


def _adjust(logits_V: torch.Tensor, draw: Draw) -> None:
    sampling = draw.sampling
    if draw.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens = torch.tensor(list(draw.counts), device=logits_V.device)
        counts = torch.tensor(list(draw.counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias:
        logits_V[token] += bias


def _drawn(logits_V: torch.Tensor, draw: Draw) -> int:
    # Double precision, so that the sum over a large vocabulary ends at 1.
    probabilities = torch.softmax(logits_V.double() / draw.sampling.temperature, -1)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    total = ordered.cumsum(-1)
    kept = int(torch.searchsorted(total, draw.sampling.top_p)) + 1 if draw.sampling.top_p < 1 else len(total)
    kept = min(kept, len(total))
    point = uniform(draw.sampling.seed, draw.choice, draw.step) * float(total[kept - 1])
    return int(tokens[min(int(torch.searchsorted(total, point, right=True)), kept - 1)])

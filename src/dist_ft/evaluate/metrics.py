"""Scores generated answers against reference answers. Pure.

A metric takes all answers and their references and returns one number, or None if it has nothing to score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

from dist_ft.metric_rows import Metrics

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Metric = Callable[[Sequence[str], Sequence[str]], float | None]


def score(names: Iterable[str], pattern: str | None, answers: Sequence[str], references: Sequence[str]) -> Metrics:
    """Return the metrics of some answers.

    Args:
        names: `eval.metrics`.
        pattern: `eval.regex`, which the metric `regex` needs.
        answers: What the model says.
        references: What was wanted, in the same order.
    """
    found: Metrics = {}
    for name in names:
        if not references:
            found[name] = None
        elif name == "regex":
            assert pattern is not None
            found[name] = regex(answers, references, pattern)
        else:
            found[name] = METRICS[name](answers, references)
    return found


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Share of answers that are the reference, but for surrounding white space."""
    return _mean(float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True))


def json_valid(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Share of answers that are one JSON object or array, and nothing else."""
    return _mean(float(isinstance(_parse(answer), dict | list)) for answer in answers)


def json_fields(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Share of the reference object's fields that the answer has with an equal value, mean over the rows.

    Rows whose reference is no object, or an empty one, do not count; an answer that is no object has no fields.
    """
    return _mean(
        _share_of_fields(_parse(answer), wanted)
        for answer, reference in zip(answers, references, strict=True)
        if isinstance(wanted := _parse(reference), dict) and wanted
    )


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """F1 of the longest common subsequence of words (Lin 2004), mean over the rows; words of any script."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return _mean(scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True))


def bleu(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU (Papineni et al. 2002) as sacreBLEU computes it by default, 0 to 100."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), [list(references)]).score)


def regex(answers: Sequence[str], references: Sequence[str], pattern: str) -> float | None:
    """Share of answers whose first match is the reference's; any match will do where the reference has none.

    What is compared is the groups of the pattern where it has any, else the whole match.
    """
    compiled = re.compile(pattern)

    def agrees(answer: str, reference: str) -> bool:
        found, wanted = compiled.search(answer), compiled.search(reference)
        if found is None or wanted is None:
            return found is not None
        return (found.groups() or found[0]) == (wanted.groups() or wanted[0])

    return _mean(float(agrees(a, r)) for a, r in zip(answers, references, strict=True))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "rouge_l": rouge_l,
    "bleu": bleu,
}


class _Words:
    """Tokenizer of rouge_score; its own knows a to z only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _share_of_fields(answer: Json, wanted: dict[str, Json]) -> float:
    if not isinstance(answer, dict):
        return 0.0
    return sum(key in answer and _is_equal(answer[key], value) for key, value in wanted.items()) / len(wanted)


def _is_equal(a: Json, b: Json) -> bool:
    """Compare JSON values: 1 equals 1.0, but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _parse(text: str) -> Json:
    """Return the JSON value that a text is; None for other texts, as for `null`."""
    try:
        value: Json = json.loads(text, parse_constant=_refuse)
        return value
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None

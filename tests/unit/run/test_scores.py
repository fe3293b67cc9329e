"""Best evaluation and early stop: tables, and that what comes later changes no decision."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.metric_rows import EvalRow
from dist_ft.run.scores import LOWER_IS_BETTER, Scores, perplexity

NAN = math.nan


def _losses(*values: float) -> Scores:
    return Scores("eval_loss", {10 * (i + 1): value for i, value in enumerate(values)})


@pytest.mark.parametrize(
    ("metric", "values", "min_delta", "steps"),
    [
        ("eval_loss", [], 0.0, []),
        ("eval_loss", [3.0, 2.0, 2.0, 1.5], 0.0, [10, 20, 40]),
        ("eval_loss", [3.0, 2.95, 2.85], 0.1, [10, 30]),  # against the last improvement, not the last value
        ("eval_loss", [NAN, 3.0, NAN, 2.0], 0.0, [20, 40]),
        ("eval_loss", [NAN, math.inf], 0.0, []),
        ("token_accuracy", [0.1, 0.3, 0.2, 0.4], 0.0, [10, 20, 40]),
    ],
)
def test_improvements(metric: str, values: list[float], min_delta: float, steps: list[int]) -> None:
    scores = Scores(metric, {10 * (i + 1): value for i, value in enumerate(values)})
    assert scores.improvements(min_delta) == steps
    if min_delta == 0:
        assert scores.best() == (steps[-1] if steps else None)


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "is_over"),
    [
        ([], 1, 0.0, False),
        ([3.0], 1, 0.0, False),
        ([3.0, 3.0], 1, 0.0, True),
        ([3.0, 3.1], 2, 0.0, False),
        ([3.0, 3.1, 3.2], 2, 0.0, True),
        ([3.0, 3.1, 2.9], 2, 0.0, False),
        ([3.0, 2.99, 2.98], 2, 0.1, True),
        ([NAN, NAN], 2, 0.0, True),
        ([NAN], 2, 0.0, False),
    ],
)
def test_patience(values: list[float], patience: int, min_delta: float, is_over: bool) -> None:
    assert _losses(*values).is_exhausted(patience, min_delta) is is_over


def test_the_best_of_some_steps_is_chosen_among_those_that_were_measured() -> None:
    scores = _losses(3.0, 1.0, 2.0)
    assert scores.best([10, 30, 99]) == 30
    assert scores.best([99]) is None


def test_the_base_model_and_the_end_of_a_shorter_run_do_not_count() -> None:
    rows = [EvalRow(step, 1, {"eval_loss": 1.0}) for step in (0, 10, 25, 20, 33)]
    assert list(Scores.of(rows, "eval_loss", 10, 33).values) == [10, 20, 33]


def test_a_number_that_was_not_finite_is_null_on_disk_and_never_best() -> None:
    scores = Scores.of([EvalRow(1, 1, {"eval_loss": None}), EvalRow(2, 1, {})], "eval_loss", 1, 9)
    assert len(scores.values) == 2
    assert scores.best() is None


Numbers = st.lists(st.floats(0, 5) | st.just(NAN), max_size=12)


@given(Numbers, st.sampled_from(sorted(LOWER_IS_BETTER)), st.integers(1, 4), st.floats(0, 1))
def test_what_comes_later_changes_no_decision(
    values: list[float], metric: str, patience: int, min_delta: float
) -> None:
    whole = Scores(metric, dict(enumerate(values, start=1)))
    improvements = whole.improvements(min_delta)
    for length in range(len(values) + 1):
        start = Scores(metric, {step: whole.values[step] for step in range(1, length + 1)})
        assert start.improvements(min_delta) == [step for step in improvements if step <= length]
        shuffled = Scores(metric, dict(reversed(start.values.items())))
        assert shuffled.is_exhausted(patience, min_delta) == start.is_exhausted(patience, min_delta)


@pytest.mark.parametrize(("loss", "wanted"), [(0.0, 1.0), (1.0, math.e), (1000.0, None), (NAN, None), (math.inf, None)])
def test_perplexity_is_a_number_that_json_has(loss: float, wanted: float | None) -> None:
    assert perplexity(loss) == wanted


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 1), ("a/eval_loss", 2), ("a/token_accuracy", 3)])
def test_a_held_out_set_may_choose_the_best_step(metric: str, best: int) -> None:
    numbers = {1: (1.0, 3.0, 0.1), 2: (2.0, 1.0, 0.2), 3: (3.0, 2.0, 0.3)}
    names = ("eval_loss", "a/eval_loss", "a/token_accuracy")
    rows = [EvalRow(step, 1, dict(zip(names, values, strict=True))) for step, values in numbers.items()]
    scores = Scores.of(rows, metric, 1, 3)
    assert (scores.best(), scores.ranking()[0]) == (best, best)

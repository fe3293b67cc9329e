"""Metrics of generated answers: what counts, what does not, and that no answer breaks them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.config.training_sections import EvalConfig
from dist_ft.evaluate.merge import AnsweredRow, EvalShare, merge
from dist_ft.evaluate.metrics import METRICS, bleu, exact_match, json_fields, json_valid, regex, rouge_l, score


def test_exact_match_looks_away_from_surrounding_space() -> None:
    assert exact_match([" a\n", "b", ""], ["a", "c", ""]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "is_valid"),
    [
        ('{"a": 1}', True),
        (" [1, 2]\n", True),
        ("7", False),  # a word, not a document
        ('"text"', False),
        ("null", False),
        ("", False),
        ('{"a": 1} or so', False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": NaN}', False),
        ("[" * 100_000, False),
        ("[" + "9" * 5000 + "]", False),  # more digits than Python converts
    ],
)
def test_json_validity(answer: str, is_valid: bool) -> None:
    assert json_valid([answer], [""]) == float(is_valid)


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}, 1.0),
        ({"b": 2.0, "a": 1}, {"a": 1, "b": 2}, 1.0),
        ({"a": True, "b": "2"}, {"a": 1, "b": 2}, 0.0),
        ({"a": None}, {"a": None, "b": None}, 0.5),  # a field that is missing is not null
        ({"a": 1, "more": 5}, {"a": 1}, 1.0),
        ({"a": {"x": [1, True]}}, {"a": {"x": [1, 1]}}, 0.0),
        ({"a": {"x": [1, 2]}}, {"a": {"x": [1, 2]}}, 1.0),
        ([1], {"a": 1}, 0.0),
    ],
)
def test_json_fields(answer: object, reference: object, share: float) -> None:
    assert json_fields([json.dumps(answer)], [json.dumps(reference)]) == share


def test_json_fields_is_over_the_rows_that_have_fields() -> None:
    assert json_fields(["{}", '{"a": 1}', "no"], ["text", '{"a": 1}', "{}"]) == 1.0
    assert json_fields(["x"], ["text"]) is None


def test_rouge_l_is_the_f1_of_the_common_subsequence_in_any_script() -> None:
    assert rouge_l(["the cat sat"], ["the cat sat"]) == 1.0
    # Common: the, sat. Precision 2/3, recall 2/4.
    assert rouge_l(["the dog sat"], ["the cat sat down"]) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert rouge_l(["Größe und Maß"], ["größe und maß"]) == 1.0
    assert rouge_l(["", "x"], ["a", ""]) == 0.0


def test_bleu_is_of_all_answers_together() -> None:
    same = "the quick brown fox jumps over the dog"
    assert bleu([same, same], [same, same]) == pytest.approx(100)
    assert bleu([same, "nothing like it at all"], [same, "quite other words stand here"]) not in (0.0, 50.0, 100.0)
    assert bleu([""], ["a b c d"]) == 0.0


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "agrees"),
    [
        (r"\d+", "so 42, not 7", "it is 42", True),
        (r"\d+", "7 or 42", "42", False),  # the first match counts
        (r"\d+", "none", "42", False),
        (r"\d+", "9", "none", True),
        (r"\d+", "none", "none", False),
        (r"(\d+) (?:km|kilometres)", "12 km", "about 12 kilometres", True),
        (r"(a)|(b)", "b", "a", False),
    ],
)
def test_regex(pattern: str, answer: str, reference: str, agrees: bool) -> None:
    assert regex([answer], [reference], pattern) == float(agrees)


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_no_answer_breaks_a_metric(rows: list[tuple[str, str]]) -> None:
    names = [*METRICS, "regex"]
    found = score(names, r"\w", [a for a, _ in rows], [r for _, r in rows])
    assert list(found) == names
    for name, value in found.items():
        assert value is None or 0 <= value <= (100.0001 if name == "bleu" else 1.0001)


def test_shares_come_together_in_the_order_of_the_rows() -> None:
    def share(eval_s: float, answers: dict[int, str]) -> EvalShare:
        rows = [AnsweredRow(row, "q" * 5000, str(row), {"base": "", "tuned": tuned}) for row, tuned in answers.items()]
        return EvalShare.from_dict(json.loads(json.dumps(asdict(EvalShare(tuple(rows), {}, eval_s)))))

    config = EvalConfig(metrics=["exact_match"])
    shares = [share(2.0, {1: "1", 3: "no"}), share(3.5, {0: "0", 2: "2"})]
    merged = merge(config, ["base", "tuned"], shares)
    assert merged.models == {"base": {"exact_match": 0.0}, "tuned": {"exact_match": 0.75}}
    assert (merged.num_rows, merged.eval_s) == (4, 3.5)
    assert [sample["reference"] for sample in merged.samples] == ["0", "1", "2", "3"]
    assert len(merged.samples[0]["prompt"]) == 2000
    assert merge(config, ["base", "tuned"], [shares[1], shares[0]]) == merged


def test_without_rows_there_is_nothing_to_judge() -> None:
    merged = merge(EvalConfig(metrics=["exact_match"]), ["base"], [EvalShare((), {"base": {"eval_loss": 2.0}}, 0.1)])
    assert merged.models == {"base": {"eval_loss": 2.0, "exact_match": None}}

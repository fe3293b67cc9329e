"""The embedded `orders` data: fixed, disjoint, strict and varied."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from dist_ft.data.sources import generated
from dist_ft.data.sources.generated import CITIES, COLORS, EMBEDDED, ITEMS, NAMES, NUM_EVAL_ONLY, embedded_rows
from dist_ft.errors import DataError

KEYS = ["name", "item", "count", "color", "city", "priority"]
SPLITS = ["orders/train", "orders/eval"]
PAIRS = ["orders-pairs/train", "orders-pairs/eval"]


def _messages(name: str) -> list[list[dict[str, str]]]:
    rows: list[Any] = embedded_rows(name)
    return [row["messages"] for row in rows]


def _requests(name: str) -> list[str]:
    return [messages[1]["content"] for messages in _messages(name)]


def _answers(name: str) -> list[str]:
    return [messages[2]["content"] for messages in _messages(name)]


def _digest(name: str) -> str:
    return hashlib.sha256(json.dumps(embedded_rows(name)).encode()).hexdigest()


@pytest.mark.parametrize(("name", "num_rows"), [("orders/train", 2000), ("orders/eval", 200)])
def test_sizes(name: str, num_rows: int) -> None:
    assert len(embedded_rows(name)) == num_rows


def test_every_embedded_name_is_covered_here() -> None:
    assert list(EMBEDDED) == [*SPLITS, *PAIRS]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_a_right_and_a_wrong_answer_of_one_form(name: str) -> None:
    rows = embedded_rows(name)
    assert rows == embedded_rows(name)
    for row in rows:
        right, wrong = (json.loads(row[side][0]["content"]) for side in ("chosen", "rejected"))
        assert list(right) == list(wrong)
        assert 1 <= sum(right[key] != wrong[key] for key in right) <= 2
        assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]


# Change these only on purpose: stored exact-match figures belong to these very rows. Each test process has
# its own hash seed, so this also fails when rows depend on it.
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("orders/train", "3e9bfa4c81f5408709feef0b0d2e6d95a95e015f64c01806c2142144c198ac60"),
        ("orders/eval", "b4da57b970911c1498f10ea4022f96fa25a267e6a98455800cd0d35c170e85fa"),
    ],
)
def test_rows_are_the_same_on_every_machine_and_call(name: str, digest: str) -> None:
    assert _digest(name) == _digest(name) == digest


def test_callers_may_change_what_they_get() -> None:
    embedded_rows("orders/eval").clear()
    assert len(embedded_rows("orders/eval")) == 200


def test_splits_share_no_request_and_no_answer() -> None:
    assert set(_requests("orders/train")).isdisjoint(_requests("orders/eval"))
    assert set(_answers("orders/train")).isdisjoint(_answers("orders/eval"))


def test_any_seed_keeps_the_splits_apart() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        for name in SPLITS:
            order = generated._draw_order(rng, EMBEDDED[name])
            assert generated._is_eval_answer(order) == (name == "orders/eval")


def test_a_request_determines_its_answer() -> None:
    words = [*NAMES, *CITIES, *ITEMS, *(f"{item}s" for item in ITEMS), *COLORS]
    lowered = [word.lower() for word in words]
    assert len(set(lowered)) == len(lowered)
    fixed = " ".join([*generated._PHRASINGS, *generated._GREETINGS, *generated._THANKS]).lower()
    notes = " ".join(note for notes in generated._PRIORITY_NOTES.values() for note in notes).lower()
    assert set(lowered).isdisjoint(_tokens(fixed) | _tokens(notes))


def _tokens(text: str) -> set[str]:
    return set("".join(char if char.isalpha() else " " for char in text).split())


@pytest.mark.parametrize("name", SPLITS)
def test_rows_are_unique_within_a_split(name: str) -> None:
    assert len(set(_requests(name))) == len(_requests(name))
    assert len(set(_answers(name))) == len(_answers(name))


def test_eval_has_names_and_cities_that_train_never_sees() -> None:
    train = " ".join(_requests("orders/train") + _answers("orders/train"))
    new = (*NAMES[-NUM_EVAL_ONLY:], *CITIES[-NUM_EVAL_ONLY:])
    assert not [word for word in new if word in train]
    with_new = [request for request in _requests("orders/eval") if any(word in request for word in new)]
    assert 40 <= len(with_new) <= 120


@pytest.mark.parametrize("name", SPLITS)
def test_rows_are_three_turns_with_one_short_system_message(name: str) -> None:
    for row in embedded_rows(name):
        assert list(row) == ["messages"]
    for messages in _messages(name):
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert messages[0]["content"] == "Turn the request into JSON."


@pytest.mark.parametrize("name", SPLITS)
def test_answers_are_strict_compact_json(name: str) -> None:
    for answer in _answers(name):
        data = json.loads(answer)
        assert list(data) == KEYS
        assert json.dumps(data, separators=(",", ":")) == answer
        assert data["name"] in NAMES and data["item"] in ITEMS and data["city"] in CITIES
        assert data["color"] in (None, *COLORS) and data["priority"] in ("high", "normal", "low")
        assert type(data["count"]) is int and data["count"] in (*range(1, 10), 12)


@pytest.mark.parametrize("name", SPLITS)
def test_requests_name_every_value_of_their_answer(name: str) -> None:
    for request, answer in zip(_requests(name), _answers(name), strict=True):
        data = json.loads(answer)
        assert data["name"] in request and data["city"] in request
        plural = data["item"] if data["count"] == 1 else f"{data['item']}s"
        goods = f"{data['color']} {plural}" if data["color"] else f"{plural} in any color"
        assert any(f"{words} {goods}" in request.lower() for words in generated._COUNT_WORDS[data["count"]])
        notes = [note for note in generated._PRIORITY_NOTES[data["priority"]] if note in request]
        assert notes
        assert len(request) <= 120 and request[0] == request[0].upper() and "  " not in request


@pytest.mark.parametrize("name", SPLITS)
def test_rows_are_varied(name: str) -> None:
    answers = [json.loads(answer) for answer in _answers(name)]
    for key, floor in {"name": 40, "city": 40, "item": 40, "color": 12, "count": 10, "priority": 3}.items():
        assert len({answer[key] for answer in answers}) >= floor, key
    nulls = sum(answer["color"] is None for answer in answers) / len(answers)
    assert 0.15 <= nulls <= 0.4
    assert len(generated._PHRASINGS) >= 12
    shapes = {request.split()[0] for request in _requests(name) if not request.startswith(("Hi!", "Hello"))}
    assert len(shapes) >= 20


@pytest.mark.parametrize("name", ["orders", "orders/test", "embedded:orders/train", ""])
def test_unknown_name_is_a_data_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(DataError) as caught:
        embedded_rows(name)
    assert f"embedded:{name}:" in str(caught.value)
    assert all(known in str(caught.value) for known in EMBEDDED)

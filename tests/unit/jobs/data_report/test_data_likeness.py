"""What `data check` finds by comparing rows and by looking into them: near copies, leaks, answers, personal data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.jobs.data_report.measure import Measures, measure
from dist_ft.jobs.data_report.summary import Noted
from tests.helpers.configs import config_of

Write = Callable[..., str]
WORDS = [f"word{n}" for n in range(3000)]


def chat(question: str, answer: str = "yes", system: str = "") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": [{"role": "system", "content": system}] * bool(system) + turns})


def prose(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=60))


def alike(seed: int) -> str:
    words = prose(seed).split()
    return " ".join([*words[:30], "other", *words[31:]])


def measured(tmp_path: Path, *sources: str, **changes: Any) -> Measures:
    return measure(config_of(tmp_path, *sources, **changes))


def test_near_copies_are_named_with_the_first_and_equal_rows_are_not_among_them(tmp_path: Path, write: Write) -> None:
    a = write(chat(prose(0)), "broken", chat(prose(1)), chat(prose(1)), chat(alike(0)))
    b = write(chat(alike(1)), chat(alike(1)), chat(prose(2)), name="b.jsonl")
    measures = measured(tmp_path, a, b)
    assert measures.near == Noted(2, [f"{a}:5 is like {a}:1", f"{b}:1 is like {a}:3"])
    assert measures.repeats == Noted(2, [f"{a}:4 equals {a}:3", f"{b}:2 equals {b}:1"])
    assert measures.leaks == Noted()


def test_a_shared_system_prompt_makes_no_near_copies(tmp_path: Path, write: Write) -> None:
    source = write(*(chat(" ".join(prose(n).split()[:6]), system=prose(999)) for n in range(30)))
    assert measured(tmp_path, source).near == Noted()


def test_held_out_rows_that_are_nearly_trained_on_are_named_with_both_places(tmp_path: Path, write: Write) -> None:
    train = write(*(chat(prose(n)) for n in range(100)))
    held_out = write(chat(prose(200)), chat(alike(42)), chat(prose(7)), "broken", chat(alike(43)), name="e.jsonl")
    measures = measured(tmp_path, train, data__eval=held_out)
    assert measures.leaks == Noted(2, [f"{held_out}:2 is like {train}:43", f"{held_out}:5 is like {train}:44"])
    assert measures.overlap == Noted(1, [f"{held_out}:3 equals {train}:8"])


def test_near_copies_on_both_sides_of_a_fraction_are_leaks(tmp_path: Path, write: Write) -> None:
    lines = [chat(text(n)) for n in range(40) for text in (prose, alike)]
    measures = measured(tmp_path, write(*lines), data__eval=0.5)
    assert 10 < measures.leaks.count < 30
    assert measures.overlap == Noted()
    assert measures.near.count + measures.leaks.count < 40


def test_what_is_curated_away_is_no_finding(tmp_path: Path, write: Write) -> None:
    source, held_out = (
        write(*(chat(text(n)) for n in range(20) for text in (prose, prose, alike))),
        write(chat(alike(3)), name="e.jsonl"),
    )
    curation = {"exact": True, "near": 0.8, "against_eval": True}
    measures = measured(tmp_path, source, data__eval=held_out, data__curation=curation)
    assert measures.near == measures.repeats == measures.leaks == measures.overlap == Noted()
    assert measures.splits[0].num_rows == 19
    assert measures.splits[0].request.removed.counts == {"against_eval": 3, "exact": 19, "near": 19}


LONG = "I am sorry, but I cannot help you with that request."


@pytest.mark.parametrize(
    ("answers", "count"),
    [
        ([LONG] * 10, 10), ([LONG] * 9, 0), ([LONG + "\n"] * 5 + [" " + LONG] * 6, 11), (["yes"] * 50, 0),
        ([f"{n} {LONG}" for n in range(50)], 0),
    ],
)  # fmt: skip
def test_an_answer_to_many_questions_is_counted(tmp_path: Path, write: Write, answers: list[str], count: int) -> None:
    source = write(chat("other", "other"), *(chat(prose(n), answer) for n, answer in enumerate(answers)))
    found = measured(tmp_path, source, data__seq_len=1024).repeated_answers
    assert found == (Noted(count, [f"{source}:2 and {count - 1} more"]) if count else Noted())


def test_copies_of_a_row_do_not_make_its_answer_a_repeated_one(tmp_path: Path, write: Write) -> None:
    assert measured(tmp_path, write(*[chat("q", LONG)] * 30)).repeated_answers == Noted()


def test_personal_data_is_counted_by_kind_and_shown_masked(tmp_path: Path, write: Write) -> None:
    source = write(
        chat("I am jane.roe@example.com", "Call +14155552671 or mail jane.roe@example.com"),
        chat("clean"),
        chat("x", "4111 1111 1111 1111", system="john@example.com"),
    )
    (split,) = measured(tmp_path, source).splits
    assert split.personal == {
        "email": Noted(2, [f"{source}:1: ja…om", f"{source}:3: jo…om"]),
        "phone": Noted(1, [f"{source}:1: +1…71"]),
        "card": Noted(1, [f"{source}:3: 41…11"]),
    }
    assert (split.num_personal_rows, split.redacted) == (2, {})


def test_what_is_redacted_is_a_note_and_no_finding(tmp_path: Path, write: Write) -> None:
    source = write(chat("I am jane@example.com", "Call +14155552671"), chat("john@example.com"))
    (split,) = measured(tmp_path, source, data__redact=["email"]).splits
    assert split.personal == {"phone": Noted(1, [f"{source}:1: +1…71"])}
    assert (split.num_personal_rows, split.redacted) == (1, {"email": 2})

"""What is measured of data, against the run's own preparation and against files with known mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.data.shards import request
from dist_ft.errors import DataError
from dist_ft.jobs.data_report import measure as module
from dist_ft.jobs.data_report.findings import find_problems, summarize
from dist_ft.jobs.data_report.measure import Measures, SplitCounts, measure
from dist_ft.jobs.data_report.summary import Noted
from dist_ft.model.embedded import CHATML, byte_tokenizer
from dist_ft.records import Conversation, Message, Sample
from tests.helpers.configs import config_of, preference_config, tiny_config
from tests.helpers.families import make_family
from tests.helpers.splits import prepared_splits

Write = Callable[..., str]


def conversation(*contents: str, **more: Any) -> str:
    """A line of user and assistant in turn."""
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more})


GOOD = conversation("hi", "hello")
REFUSES_BAD = "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"


def only_split(tmp_path: Path, source: str, **changes: Any) -> SplitCounts:
    (split,) = measure(config_of(tmp_path, source, **changes)).splits
    return split


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_are_counted_as_they_are_prepared(tmp_path: Path, packing: bool) -> None:
    config = preference_config(tmp_path, {"kind": "dpo"}, data__packing=packing, data__seq_len=56)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
        file.write(json.dumps({"prompt": "p", "chosen": "a long answer", "rejected": "b" * 80}) + "\n")
        file.write(json.dumps({"messages": json.loads(GOOD)["messages"]}) + "\n")
    config = config.model_copy(update={"data": config.data.model_copy(update={"bad_rows": "skip"})})
    (split, _), ((prepared,), _) = measure(config).splits, prepared_splits(config)
    counts = prepared.known_counts
    assert (split.num_sequences, split.num_tokens) == (counts.num_sequences, counts.num_tokens)
    assert 2 * split.num_pairs == counts.num_samples
    assert [problem.split(": ")[1][:26] for problem in split.unreadable.first] == ["`chosen` and `rejected` are"[:26]]
    assert ["this objective learns from pairs" in problem for problem in split.refused.first] == [True]
    assert split.longer_chosen.count + split.longer_rejected.count <= split.num_pairs
    assert any("43" in place for place in split.longer_rejected.first) or split.longer_rejected.count > 5


@pytest.mark.parametrize("window_rows", [5, 8192])
@pytest.mark.parametrize(("packing", "seq_len"), [(True, 160), (True, 56), (False, 56)])
@pytest.mark.parametrize("held_out", ["a source", 0.3, None])
@pytest.mark.parametrize("long_samples", ["truncate", "drop", "split"])
def test_counts_are_those_of_the_runs_own_preparation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window_rows: int,
    packing: bool,
    seq_len: int,
    held_out: str | float | None,
    long_samples: str,
) -> None:
    monkeypatch.setattr(request, "WINDOW_ROWS", window_rows)
    held = {} if held_out == "a source" else {"data__eval": held_out}
    config = tiny_config(
        tmp_path, data__packing=packing, data__seq_len=seq_len, data__long_samples=long_samples, **held
    )
    splits, eval_split = prepared_splits(config)
    prepared = [*splits, *([eval_split] if eval_split else [])]
    counts = measure(config).splits
    assert [split.name for split in counts] == ["train.0", "eval"][: len(prepared)]
    assert [
        (c.num_rows, c.num_sequences, c.num_tokens, c.num_trained_tokens, c.untrained.count, c.long.count)
        for c in counts
    ] == [
        (
            p.known_counts.num_rows,
            p.known_counts.num_sequences,
            p.known_counts.num_tokens,
            p.known_counts.num_trained_tokens,
            p.known_counts.num_untrained_rows,
            p.known_counts.num_long_samples,
        )
        for p in prepared
    ]
    if seq_len == 160:
        assert counts[0].num_sequences == counts[0].num_packed < 25
        return
    assert counts[0].long.count > counts[0].untrained.count
    assert (counts[0].untrained.count > 0) == (long_samples == "truncate")


@pytest.mark.parametrize("window_rows", [3, 8192])
def test_rows_that_a_run_skips_are_counted_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, window_rows: int
) -> None:
    monkeypatch.setattr(request, "WINDOW_ROWS", window_rows)
    (tmp_path / "t.jinja").write_text(REFUSES_BAD + CHATML)
    lines = [line for n in range(20) for line in ("broken", conversation("bad", "x"), conversation(f"q{n}", "x" * n))]
    config = config_of(
        tmp_path, write(*lines), data__bad_rows="skip", data__packing=True, data__seq_len=100,
        data__chat_template=str(tmp_path / "t.jinja"),
    )  # fmt: skip
    ((prepared,), _) = prepared_splits(config)
    (split,) = measure(config).splits
    assert (split.unreadable.count, split.refused.count, prepared.known_counts.num_bad_rows) == (20, 20, 40)
    assert (split.num_rows - 20, split.num_sequences, split.num_tokens) == (
        prepared.known_counts.num_rows, prepared.known_counts.num_sequences, prepared.known_counts.num_tokens,
    )  # fmt: skip


def test_all_problems_of_a_file_are_found_at_once(tmp_path: Path, write: Write) -> None:
    source = write("broken", GOOD, "5", conversation("no answer"), *["{}"] * 7, GOOD)
    split = only_split(tmp_path, source)
    assert (split.num_rows, split.unreadable.count) == (2, 10)
    assert [place.split(": ")[0] for place in split.unreadable.first] == [f"{source}:{n}" for n in (1, 3, 4, 5, 6)]


def test_a_bad_row_is_counted_once_where_a_source_has_two_sides(tmp_path: Path, write: Write) -> None:
    source = write("broken", *(conversation(f"question {n}", "x") for n in range(40)))
    train, held_out = measure(config_of(tmp_path, source, data__eval=0.4)).splits
    assert train.num_rows + held_out.num_rows == 40
    assert (train.unreadable.count, held_out.unreadable.count) == (1, 0)


def test_a_file_of_bad_rows_has_no_others(tmp_path: Path, write: Write) -> None:
    split = only_split(tmp_path, write("broken", "[]"))
    assert (split.num_rows, split.unreadable.count, split.num_sequences) == (0, 2, 0)


def test_a_source_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="embedded:nothing"):
        measure(config_of(tmp_path, "embedded:nothing"))


def test_rows_that_the_template_refuses_are_named(tmp_path: Path, write: Write) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(REFUSES_BAD + CHATML)
    source = write(GOOD, conversation("bad", "x"), GOOD)
    split = only_split(tmp_path, source, data__chat_template=str(template))
    assert (split.num_rows, split.num_sequences, split.refused.count) == (3, 2, 1)
    assert split.refused.first[0].startswith(f"{source}:2: ")


def test_rows_whose_answer_is_cut_off_are_told_from_the_others_that_are_cut(tmp_path: Path, write: Write) -> None:
    source = write(GOOD, conversation("x" * 200, "hidden"), conversation("hi", "long" * 50))
    split = only_split(tmp_path, source)
    assert split.long == Noted(2, [f"{source}:2: 227 tokens", f"{source}:3: 223 tokens"])
    assert split.untrained == Noted(1, [f"{source}:2"])
    assert split.num_hidden_rows == 1
    # The answer that the cut ends says nothing about how answers end.
    assert (split.num_answers, split.unended.count) == (1, 0)


def test_lengths_and_turns_are_of_all_rows(tmp_path: Path, write: Write) -> None:
    source = write(GOOD, GOOD, conversation("a", "b", "c", "d"))
    split = only_split(tmp_path, source)
    assert split.turns == {2: 2, 4: 1}
    tokenizer = byte_tokenizer()
    whole = tokenizer.apply_chat_template(json.loads(GOOD)["messages"], tokenize=False)
    assert split.lengths[len(tokenizer(whole)["input_ids"])] == 2
    assert split.lengths.total() == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain < text |", None),
        ("end <|im_end|> here", "<|im_end|>"),
        ("<|im_start|>system", "<|im_start|>"),
        ("<|pad|>", "<|pad|>"),
        ("<|im_end", None),
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_text_that_reads_as_a_special_token_is_found(
    tmp_path: Path, write: Write, text: str, found: str | None, turn: int
) -> None:
    source = write(GOOD, conversation(*(["hi", text] if turn else [text, "hello"])))
    split = only_split(tmp_path, source)
    assert split.control_text == (Noted(1, [f"{source}:2: {found}"]) if found else Noted())


@pytest.mark.parametrize(("answer", "is_empty"), [("", True), (" \n", True), ("0", False)])
def test_empty_answers_are_found(tmp_path: Path, write: Write, answer: str, is_empty: bool) -> None:
    source = write(GOOD, conversation("a", answer, "c", "d"))
    assert only_split(tmp_path, source).empty_answers == (Noted(1, [f"{source}:2"]) if is_empty else Noted())


@pytest.mark.parametrize(
    ("turn", "is_empty"),
    [
        ({"role": "assistant"}, True),
        ({"role": "assistant", "weight": 0}, False),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, False),
        ({"role": "assistant", "tool_calls": []}, True),
        ({"role": "assistant", "reasoning_content": "hm"}, False),
        ({"role": "user"}, False),
    ],
)
def test_an_answer_that_calls_or_is_not_trained_is_not_empty(turn: dict[str, Any], is_empty: bool) -> None:
    message: Message = {"content": " ", **turn}  # type: ignore[typeddict-item]
    assert Conversation([message]).has_empty_answer() == is_empty


NO_END = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_keys_that_nothing_reads_are_found_with_their_places(tmp_path: Path, write: Write) -> None:
    lines = [GOOD, conversation("hi", "there", reward=1, mood=2), conversation("hi", "you", reward=1, id=7)]
    config = config_of(tmp_path, write(*lines), data__group_by="mood", data__bad_rows="skip")
    (split,) = measure(config).splits
    assert split.unread == {"reward of a row": Noted(1, [f"{tmp_path}/a.jsonl:2"])}  # the others have no `mood`
    (split,) = measure(config_of(tmp_path, config.data.train[0].source)).splits
    assert {key: noted.count for key, noted in split.unread.items()} == {"reward of a row": 2, "mood of a row": 1}
    assert summarize(split).unread_keys == {"mood of a row": 1, "reward of a row": 2}
    finding = next(
        one for one in find_problems(Measures([split], *[Noted()] * 3, [])) if "'reward of a row'" in one.message
    )
    assert (finding.severity, finding.count, finding.places) == (
        "warning", 2, [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:3"]
    )  # fmt: skip


@pytest.mark.parametrize(("template", "num_unended"), [(CHATML, 0), (NO_END, 3)])
def test_answers_that_do_not_end_in_a_stop_token_are_counted(
    tmp_path: Path, write: Write, template: str, num_unended: int
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    source = write(GOOD, conversation("a", "b", "c", "d"))
    split = only_split(tmp_path, source, data__chat_template=str(tmp_path / "t.jinja"))
    assert (split.num_answers, split.unended.count) == (3, num_unended)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The tiny model with a BOS token, an end-of-text token as EOS, and the end of a turn for generation only."""
    path = tmp_path / "model"
    make_family("llama", path)  # with rows for more tokens
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(path)
    return path


def set_stops(model: Path, stops: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))


def test_generation_may_stop_at_more_than_the_tokenizers_eos(tmp_path: Path, write: Write, other_model: Path) -> None:
    im_end = byte_tokenizer().eos_token_id
    config = config_of(tmp_path, write(GOOD), model__name=str(other_model))
    found = []
    for stops in (None, im_end, [im_end, 65]):
        set_stops(other_model, stops)
        measures = measure(config)
        found.append((len(measures.stops), "<|im_end|>" in measures.stops, measures.splits[0].unended.count))
        assert "</s>" in measures.stops
    assert found == [(1, False, 1), (2, True, 0), (3, True, 0)]


@pytest.mark.parametrize(("begins", "num_doubled"), [("{{ bos_token }}", 0), ("{{ bos_token }}{{ bos_token }}", 2)])
def test_a_doubled_bos_is_counted(
    tmp_path: Path, write: Write, other_model: Path, begins: str, num_doubled: int
) -> None:
    (tmp_path / "t.jinja").write_text(begins + CHATML)
    changes = {"data__chat_template": str(tmp_path / "t.jinja"), "model__name": str(other_model)}
    split = only_split(tmp_path, write(GOOD, GOOD), **changes)
    assert split.bos_doubled.count == num_doubled


def test_equal_rows_are_named_with_the_first_of_them(tmp_path: Path, write: Write) -> None:
    same = json.dumps({"id": 7, "messages": [dict(reversed(t.items())) for t in json.loads(GOOD)["messages"]]})
    a = write("broken", GOOD, conversation("b", "b"), "", same)
    b = write(conversation("c", "c"), GOOD, conversation("b", "b"), name="b.jsonl")
    measures = measure(config_of(tmp_path, a, b))
    assert measures.repeats == Noted(3, [f"{a}:5 equals {a}:2", f"{b}:2 equals {a}:2", f"{b}:3 equals {a}:3"])
    assert measures.overlap == measures.eval_repeats == Noted()


def test_held_out_rows_that_are_trained_on_are_named(tmp_path: Path, write: Write) -> None:
    a = write(conversation("a", "a"), conversation("b", "b"))
    held_out = write(
        conversation("new", "new"), "broken", conversation("b", "b"), conversation("new", "new"), name="e.jsonl"
    )
    measures = measure(config_of(tmp_path, a, data__eval=held_out))
    assert measures.overlap == Noted(1, [f"{held_out}:3 equals {a}:2"])
    assert measures.eval_repeats == Noted(1, [f"{held_out}:4 equals {held_out}:1"])
    assert measures.repeats == Noted()


def test_a_held_out_fraction_overlaps_nothing(tmp_path: Path, write: Write) -> None:
    source = write(*(conversation(f"question {n % 30}", "x") for n in range(60)))
    measures = measure(config_of(tmp_path, source, data__eval=0.4))
    assert measures.overlap.count == 0
    assert measures.repeats.count + measures.eval_repeats.count == 30


def test_a_place_is_short_whatever_the_template_says(tmp_path: Path, write: Write) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception(messages[0]['content']) }}")
    split = only_split(
        tmp_path, write(conversation("x" * 1_000_000, "y")), data__chat_template=str(tmp_path / "t.jinja")
    )
    (place,) = split.refused.first
    assert len(place) <= 1000


def test_few_places_are_kept_of_many(tmp_path: Path, write: Write) -> None:
    measures = measure(config_of(tmp_path, write(*[GOOD] * 50, *["{}"] * 50)))
    assert (measures.repeats.count, len(measures.repeats.first)) == (49, 5)
    assert (measures.splits[0].unreadable.count, len(measures.splits[0].unreadable.first)) == (50, 5)


@pytest.mark.parametrize(("trained", "ends"), [("", []), ("....", []), (".xx.", [2]), (".x.x", [1, 3]), ("xxxx", [3])])
def test_ends_of_answers(trained: str, ends: list[int]) -> None:
    sample = Sample([0] * len(trained), [mark == "x" for mark in trained])
    assert module.answer_ends(sample) == ends

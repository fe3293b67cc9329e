"""Preparing a split: once per content and settings, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dist_ft.config.data_sections import LoaderConfig, RowSource
from dist_ft.data.curation.filters import NOTHING, Removed
from dist_ft.data.rows import scan
from dist_ft.data.rows.scan import Row
from dist_ft.data.shards import request as request_module
from dist_ft.data.shards.counts import MAX_UNREAD, Counts, total
from dist_ft.data.shards.make import RenderMany, fit, make_shard
from dist_ft.data.shards.request import SplitRequest, plan_split
from dist_ft.data.shards.split import (
    PreparedSplit,
    complete_split,
    describe_omissions,
    describe_unread,
    missing_shards,
    open_ended_split,
    quarantine_of,
)
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import cut_parts
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import DataError
from dist_ft.records import Conversation, Record, Sample
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import config_of

Render = Callable[[Record], list[Sample]]
ROW = cast(Row, None)
"""Only an error names the row."""


def render(record: Record) -> list[Sample]:
    """Characters are tokens; those of assistant turns are trained."""
    assert isinstance(record, Conversation)
    messages = record.messages
    return [
        Sample(
            [ord(character) for turn in messages for character in turn["content"]],
            [turn["role"] == "assistant" for turn in messages for _ in turn["content"]],
        )
    ]


def many(render: Render) -> RenderMany:
    """Makes of a renderer of one record one of many."""

    def render_one(record: Record) -> list[Sample] | DataError:
        try:
            return render(record)
        except DataError as error:
            return error

    return lambda records: [render_one(record) for record in records]


def prepare_split(request: SplitRequest, render: Render, cache_dir: Path) -> PreparedSplit:
    """Makes what is missing of a split, as a run does."""
    store = LocalStore(cache_dir)
    plan = plan_split(request)
    for _, shard in missing_shards([plan], store):
        make_shard(plan.request, shard, many(render), store)
    return complete_split(plan, store, str(cache_dir))


def key_of(request: SplitRequest) -> str:
    return plan_split(request).key


def must_not_render(record: Record) -> list[Sample]:
    raise AssertionError("rendered again")


def conversation(answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]})


def write_source(path: Path, answers: list[str]) -> str:
    path.write_text("".join(conversation(answer) + "\n" for answer in answers))
    return str(path)


def append(request: SplitRequest, text: str) -> None:
    with Path(request.sources[0].source).open("a") as file:
        file.write(text)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., SplitRequest]:
    """Writes answers as a source and asks for it, without packing unless told."""

    def make(answers: list[str], **settings: Any) -> SplitRequest:
        source = write_source(tmp_path / "a.jsonl", answers)
        defaults = {"seq_len": 32, "packing": False, "render_key": "k"}
        return SplitRequest((RowSource(source=source),), **{**defaults, **settings})

    return make


def removed(*numbers: int) -> Removed:
    rules, ends = np.zeros(len(numbers), np.uint16), np.array([100])
    return Removed(np.array(numbers, np.int64), rules, ("exact",), part_ends=ends)


def texts(split: PreparedSplit) -> list[str]:
    """Every sequence as text, the user's `?` included."""
    shards = open_split(split, LoaderConfig())
    return ["".join(map(chr, shards.read(*place)[0])) for place in places(split)]


def places(split: PreparedSplit) -> list[tuple[int, int]]:
    """(shard, row) of every sequence."""
    sizes = open_split(split, LoaderConfig()).num_sequences(np.arange(split.num_shards)).tolist()
    return [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


RequestFor = Callable[..., SplitRequest]


def test_a_split_holds_every_row_and_counts_it(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["one", "two", "three"]), render, cache_dir)
    assert texts(split) == ["?one", "?two", "?three"]
    assert asdict(split) == {
        "address": str(cache_dir), "key": split.key, "num_shards": 1,
        "counts": {
            "num_rows": 3, "num_sequences": 3, "num_tokens": 14, "num_trained_tokens": 11, "num_untrained_rows": 0,
            "num_long_samples": 0, "num_bad_rows": 0, "num_samples": 3, "num_unended": 0,
            "unread": (),
        },
        "removed_rows": {}, "max_tokens": 6, "max_trained_tokens": 5, "made_sizes": (), "early_unread": (),
        "score_key": "",
    }  # fmt: skip
    kept = json.loads((cache_dir / "splits" / f"{split.key}.json").read_text())
    assert kept == {
        "format_version": 1, "sizes": [3],
        "split": {
            "address": str(cache_dir), "key": split.key, "is_complete": True, "num_shards": 1, "num_rows": 3,
            "num_sequences": 3, "num_tokens": 14, "num_trained_tokens": 11, "num_untrained_rows": 0,
            "num_long_samples": 0, "num_bad_rows": 0, "num_samples": 3, "num_unended": 0, "unread": [],
            "removed_rows": {}, "max_tokens": 6, "max_trained_tokens": 5,
        },
    }  # fmt: skip


def test_keys_that_nothing_reads_are_named_once_a_source(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one"])
    for keys in ({"reward": 1}, {"reward": 2, "mood": "x"}, {"id": 7, "images": []}):
        append(request, json.dumps({"messages": [{"role": "assistant", "content": "abc", **keys}], **keys}) + "\n")
    unread = ("mood of a row", "mood of a turn", "reward of a row", "reward of a turn")
    with_parts = replace(request, part_bytes=100)
    for one in (request, with_parts):
        split = prepare_split(one, render, cache_dir)
        assert split.known_counts.unread == unread
        assert prepare_split(one, must_not_render, cache_dir) == split
        assert PreparedSplit.from_dict(json.loads(json.dumps(asdict(split)))) == split
    assert split.num_shards > 1
    early = open_ended_split(plan_split(with_parts), LocalStore(cache_dir), str(cache_dir), {})
    assert PreparedSplit.from_dict(json.loads(json.dumps(asdict(early)))) == early
    data = config_of(cache_dir, request.shown).data
    shown = "has keys that are not read: mood of a row, mood of a turn, reward of a row, reward of a turn; if"
    for found in (split, early):
        (line,) = describe_omissions([prepare_split(request_for(["b"]), render, cache_dir), found], found, data)
        assert line.startswith(f"data.train.1 {shown}")
    (line,) = describe_omissions([], split, data)
    assert line.startswith(f"held-out data {shown}")


def test_a_new_key_in_every_row_does_not_grow_the_counts() -> None:
    counts = total(Counts(unread=(f"key{n:03} of a row",)) for n in reversed(range(100)))
    assert counts.unread == tuple(f"key{n:03} of a row" for n in range(MAX_UNREAD))
    assert describe_unread("x", counts.unread).count("of a row") == MAX_UNREAD
    assert "\x1b" not in describe_unread("x", ["\x1b[2J of a row"])


def test_packed_rows_are_all_there(request_for: RequestFor, cache_dir: Path) -> None:
    answers = [chr(ord("a") + n) * (1 + n % 9) for n in range(26)]
    split = prepare_split(request_for(answers, packing=True, seq_len=16), render, cache_dir)
    shards = open_split(split, LoaderConfig())
    found = []
    for place in places(split):
        ids, trained, starts, _ = shards.read(*place)
        assert len(ids) <= 16
        assert not trained[starts].any()
        found += [
            "".join(map(chr, part)) for part in (ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True))
        ]
    assert sorted(found) == [f"?{answer}" for answer in answers]
    assert split.known_counts.num_sequences < len(answers) == split.known_counts.num_rows


def test_the_second_time_nothing_is_rendered(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one", "two"])
    first = prepare_split(request, render, cache_dir)
    assert prepare_split(request, must_not_render, cache_dir) == first


def test_a_cache_that_was_moved_is_found_where_it_is(request_for: RequestFor, tmp_path: Path) -> None:
    request = request_for(["one", "two"])
    prepare_split(request, render, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    split = prepare_split(request, must_not_render, tmp_path / "new")
    assert texts(split) == ["?one", "?two"]


def test_a_prepared_split_survives_a_dict(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["one"]), render, cache_dir)
    assert PreparedSplit.from_dict({**json.loads(json.dumps(asdict(split))), "extra": 1}) == split


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 33}, {"packing": True}, {"render_key": "other"}, {"held_out": 0.1},
        {"held_out": 0.1, "take_held_out": True}, {"group_by": "id"}, {"long_samples": "drop"},
        {"removed": removed(0)}, {"rows_per_slot": 2}, {"columns": ("label",)}, {"adds_mismatched": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_is_in_the_key(request_for: RequestFor, change: dict[str, Any]) -> None:
    request = request_for(["one"])
    assert key_of(replace(request, **change)) != key_of(request)


@pytest.mark.parametrize("change", [{"format": "messages"}, {"columns": {"messages": "dialog"}}], ids=str)
def test_how_rows_are_read_is_in_the_key(request_for: RequestFor, change: dict[str, Any]) -> None:
    request = request_for(["one"])
    other = request.sources[0].model_copy(update=change)
    assert key_of(replace(request, sources=(other,))) != key_of(request)
    assert key_of(replace(request, sources=request.sources * 2)) != key_of(request)


def test_removed_rows_are_left_out_and_counted(request_for: RequestFor, cache_dir: Path) -> None:
    rows = ["one", "two", "three", "four"]
    split = prepare_split(request_for(rows, removed=removed(0, 2)), render, cache_dir)
    assert (texts(split), split.known_counts.num_rows, split.removed_rows) == (["?two", "?four"], 2, {"exact": 2})


def test_a_source_of_removed_rows_only_is_an_error_that_names_the_rule(
    request_for: RequestFor, cache_dir: Path
) -> None:
    with pytest.raises(DataError, match=r"data.curation and max_rows leave out every row \(exact 2\)"):
        prepare_split(request_for(["one", "two"], removed=removed(0, 1)), render, cache_dir)


def test_no_setting_was_forgotten_in_the_table_above() -> None:
    assert set(SplitRequest.__dataclass_fields__) == {
        "sources", "seq_len", "packing", "render_key", "held_out", "take_held_out", "group_by", "long_samples",
        "bad_rows", "part_bytes", "removed", "rows_per_slot", "columns", "adds_mismatched",
    }  # fmt: skip


def test_a_run_may_go_on_without_the_bad_row_that_it_met(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one", "two"])
    append(request, "broken\n")
    key = key_of(request)
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON"):
        prepare_split(request, render, cache_dir)
    split = prepare_split(replace(request, bad_rows="skip"), render, cache_dir)
    assert (split.key, split.known_counts.num_bad_rows, texts(split)) == (key, 1, ["?one", "?two"])
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON"):
        prepare_split(request, must_not_render, cache_dir)


def test_both_sides_of_a_held_out_split_have_their_own_key(request_for: RequestFor) -> None:
    request = request_for(["one"], held_out=0.1)
    assert key_of(replace(request, take_held_out=True)) != key_of(request)


def test_the_key_is_of_content_not_of_the_path(request_for: RequestFor, tmp_path: Path, cache_dir: Path) -> None:
    request = request_for(["one", "two"])
    moved = replace(request, sources=(RowSource(source=str(shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))),))
    assert key_of(moved) == key_of(request)
    assert key_of(request_for(["one", "two!"])) != key_of(moved)
    assert prepare_split(moved, render, cache_dir).key == key_of(moved)


def test_the_version_of_preparation_is_in_the_key(request_for: RequestFor, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(["one"])
    keys = {key_of(request)}
    for name in ("PREPARATION_VERSION", "WINDOW_ROWS", "WINDOW_TOKENS"):
        with monkeypatch.context() as patch:
            patch.setattr(request_module, name, 99)
            keys.add(key_of(request))
    assert len(keys) == 4


def test_how_turns_are_read_is_in_the_key_where_there_may_be_turns(
    request_for: RequestFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("prose")
    chats = request_for(["one"])
    texts = [
        replace(chats, sources=(RowSource(source=source, format=row_format),))
        for source, row_format in (
            (str(tmp_path / "a.txt"), "auto"), (str(tmp_path / "a.jsonl"), "text"), ("embedded:orders/train", "auto"),
        )
    ]  # fmt: skip
    before = [key_of(request) for request in (chats, *texts)]
    monkeypatch.setattr(scan, "READING_VERSION", 99)
    after = [key_of(request) for request in (chats, *texts)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True, True]
    ignoring = RowSource(source=chats.sources[0].source, ignore=["images"])
    assert key_of(replace(chats, sources=(ignoring,))) != key_of(chats)


def test_rows_without_a_trained_token_are_left_out_and_counted(request_for: RequestFor, cache_dir: Path) -> None:
    # An empty answer, and one that lies wholly beyond the cut.
    request = request_for(["good", "", "fine"], seq_len=8)
    late = {"messages": [{"role": "user", "content": "x" * 8}, {"role": "assistant", "content": "late"}]}
    append(request, json.dumps(late))
    split = prepare_split(request, render, cache_dir)
    assert texts(split) == ["?good", "?fine"]
    assert (
        split.known_counts.num_rows,
        split.known_counts.num_untrained_rows,
        split.known_counts.num_long_samples,
    ) == (4, 2, 1)


def test_a_long_sample_is_cut_at_the_end(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["123456789", "12"], seq_len=8), render, cache_dir)
    assert texts(split) == ["?1234567", "?12"]
    assert split.known_counts.num_long_samples == 1


@pytest.mark.parametrize(
    "render_nothing", [lambda _: [], lambda _: [Sample([], [])], lambda _: [Sample([1, 2], [True, False])]]
)
def test_a_split_without_a_trained_token_is_refused(
    request_for: RequestFor, cache_dir: Path, render_nothing: Render
) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: none of 2 rows has a trained token"):
        prepare_split(request_for(["one", "two"]), render_nothing, cache_dir)
    assert not list(cache_dir.glob("splits/*"))


def test_a_side_of_the_held_out_split_without_rows_is_refused(request_for: RequestFor, cache_dir: Path) -> None:
    with pytest.raises(DataError, match=r"no rows fall on the held-out side with data\.eval=1e-09"):
        prepare_split(request_for(["one"], held_out=1e-9, take_held_out=True), render, cache_dir)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_held_out_rows_are_the_rest(request_for: RequestFor, cache_dir: Path, fraction: float) -> None:
    answers = [f"answer {n}" for n in range(300)]
    request = request_for(answers, held_out=fraction)
    kept = texts(prepare_split(request, render, cache_dir))
    held = texts(prepare_split(replace(request, take_held_out=True), render, cache_dir))
    assert sorted(kept + held) == sorted(f"?{answer}" for answer in answers)
    assert abs(len(held) / 300 - fraction) < 0.09  # three standard deviations of 300 draws


def test_copies_of_a_row_fall_on_one_side(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for([f"answer {n % 50}" for n in range(200)], held_out=0.3)
    kept = set(texts(prepare_split(request, render, cache_dir)))
    held = set(texts(prepare_split(replace(request, take_held_out=True), render, cache_dir)))
    assert not kept & held
    assert len(kept | held) == 50


def test_held_out_rows_of_all_sources_are_one_split(request_for: RequestFor, cache_dir: Path, tmp_path: Path) -> None:
    one = request_for([f"a{n}" for n in range(60)], held_out=0.5)
    two = RowSource(source=write_source(tmp_path / "b.jsonl", [f"b{n}" for n in range(60)]))
    joined = replace(one, sources=(*one.sources, two), take_held_out=True)
    held = texts(prepare_split(joined, render, cache_dir))
    kept = [texts(prepare_split(replace(one, sources=(s,)), render, cache_dir)) for s in (*one.sources, two)]
    assert sorted(held + kept[0] + kept[1]) == sorted(f"?{name}{n}" for name in "ab" for n in range(60))
    assert {text[1] for text in held} == {"a", "b"}


def test_rows_of_a_group_fall_on_one_side(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for([], held_out=0.4, group_by="user")
    for n in range(200):
        append(request, json.dumps({**json.loads(conversation(f"{n % 20} says {n}")), "user": n % 20}) + "\n")
    sides = [
        {text.split()[0] for text in texts(prepare_split(replace(request, take_held_out=take), render, cache_dir))}
        for take in (False, True)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 20
    assert all(sides)


LONG = ["ab", "123456789abcdefgh", "cd"]
"""The second is eighteen tokens, with the question mark."""


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("truncate", ["?ab", "?1234567", "?cd"]),
        ("drop", ["?ab", "?cd"]),
        ("split", ["?ab", "?1234567", "89abcdef", "gh", "?cd"]),
    ],
)
def test_long_samples(request_for: RequestFor, cache_dir: Path, policy: str, expected: list[str]) -> None:
    split = prepare_split(request_for(LONG, seq_len=8, long_samples=policy), render, cache_dir)
    assert texts(split) == expected
    assert (
        split.known_counts.num_rows,
        split.known_counts.num_long_samples,
        split.known_counts.num_untrained_rows,
    ) == (3, 1, 0)
    # Nothing precedes the first token of a piece.
    assert split.known_counts.num_trained_tokens == sum(len(text) - 1 for text in expected)


def test_a_long_sample_may_be_an_error(request_for: RequestFor, cache_dir: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: 18 tokens are longer than data\.seq_len=8"):
        prepare_split(request_for(LONG, seq_len=8, long_samples="error", bad_rows="skip"), render, cache_dir)


def refuse_two(record: Record) -> list[Sample]:
    """A renderer that refuses what the second row says."""
    assert isinstance(record, Conversation)
    if record.messages[-1]["content"] == "two":
        raise DataError("the template refuses\nthis\x1b[2J")
    return render(record)


def test_a_row_that_the_template_refuses_is_named(request_for: RequestFor, cache_dir: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare_split(request_for(["one", "two"]), refuse_two, cache_dir)
    assert re.search(r"a\.jsonl:2: the template refuses", str(caught.value))
    assert str(caught.value).isprintable()


def test_bad_rows_are_put_aside_and_counted(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one", "two", "three"], bad_rows="skip")
    append(request, "brok\x1ben\n" + json.dumps({"body": "x" * 50_000}) + "\n" + conversation("four"))
    split = prepare_split(request, refuse_two, cache_dir)
    assert texts(split) == ["?one", "?three", "?four"]
    assert (split.known_counts.num_rows, split.known_counts.num_bad_rows) == (3, 3)
    text = (cache_dir / quarantine_of(split.key)).read_text()
    aside = [json.loads(line) for line in text.splitlines()]
    assert [row["place"].rsplit(":")[-1] for row in aside] == ["2", "4", "5"]
    assert [row["problem"][:20] for row in aside] == [
        "the template refuses",
        "not valid JSON: Expe",
        "found keys ['body'],",
    ]
    assert json.loads(aside[0]["row"]) == json.loads(conversation("two"))
    assert len(text) < 15_000
    assert "\x1b" not in text
    assert prepare_split(request, must_not_render, cache_dir) == split


def test_a_source_of_bad_rows_only_is_refused(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for([], bad_rows="skip")
    append(request, "x\ny\n")
    with pytest.raises(DataError, match=r"all 2 rows are bad; the first is .*a\.jsonl:1: not valid JSON"):
        prepare_split(request, render, cache_dir)
    assert not list(cache_dir.glob("splits/*"))


def test_a_bad_row_counts_on_one_side_only(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for([f"answer {n}" for n in range(20)], held_out=0.5, bad_rows="skip")
    append(request, "broken\n")
    sides = [prepare_split(replace(request, take_held_out=take), render, cache_dir) for take in (False, True)]
    assert [split.known_counts.num_bad_rows for split in sides] == [1, 0]
    assert [(cache_dir / quarantine_of(split.key)).exists() for split in sides] == [True, False]


def test_packing_never_looks_beyond_a_window(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_module, "WINDOW_ROWS", 4)
    answers = [chr(ord("a") + n) * 3 for n in range(10)]
    split = prepare_split(request_for(answers, packing=True, seq_len=8), render, cache_dir)
    assert split.num_shards == 1
    assert texts(split) == ["?aaa?bbb", "?ccc?ddd", "?eee?fff", "?ggg?hhh", "?iii?jjj"]


def test_a_window_ends_early_when_it_holds_many_tokens(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_module, "WINDOW_TOKENS", 8)
    split = prepare_split(request_for(["aaa", "bbb", "c", "ddd"], packing=True, seq_len=16), render, cache_dir)
    assert texts(split) == ["?aaa?bbb", "?c?ddd"]


def test_windows_without_a_usable_row_and_shards_without_one_do_no_harm(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(request_module, "WINDOW_ROWS", 2)
    request = request_for(["a", "b", "", "", "c", "d"])
    empty = RowSource(source=write_source(tmp_path / "b.jsonl", ["", ""]))
    split = prepare_split(replace(request, sources=(empty, *request.sources)), render, cache_dir)
    assert texts(split) == ["?a", "?b", "?c", "?d"]
    assert (split.num_shards, split.known_counts.num_untrained_rows) == (2, 4)


def test_a_row_may_become_several_samples(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["one", "two"]), lambda record: render(record) * 2, cache_dir)
    assert texts(split) == ["?one", "?one", "?two", "?two"]
    assert split.known_counts.num_rows == 2


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_dying_half_way_leaves_nothing_behind(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    monkeypatch.setattr(request_module, "WINDOW_ROWS", 2)  # the first shard is on disk before the third row
    rendered = 0

    def dying(record: Record) -> list[Sample]:
        nonlocal rendered
        rendered += 1
        if rendered == dies_at:
            raise KeyboardInterrupt
        return render(record)

    request = request_for(["one", "two", "three", "four"])
    with pytest.raises(KeyboardInterrupt):
        prepare_split(request, dying, cache_dir)
    assert not [path for path in cache_dir.rglob("*") if path.is_file()]
    assert texts(prepare_split(request, render, cache_dir)) == ["?one", "?two", "?three", "?four"]


def test_a_row_that_the_renderer_refuses_is_named_by_file_and_line(request_for: RequestFor, cache_dir: Path) -> None:
    def refuses_two(record: Record) -> list[Sample]:
        if "two" in str(record):
            raise DataError("no two, please")
        return render(record)

    request = request_for(["one", "two"])
    with pytest.raises(DataError, match=f"^{re.escape(request.shown)}:2: no two, please"):
        prepare_split(request, refuses_two, cache_dir)


def test_a_bad_row_stops_the_preparation_and_leaves_nothing(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one"])
    append(request, "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        prepare_split(request, render, cache_dir)
    assert not [path for path in cache_dir.rglob("*") if path.is_file()]


def test_of_two_runs_at_once_one_does_the_work(request_for: RequestFor, cache_dir: Path) -> None:
    request, rendered, begun = request_for(["one", "two"]), [], threading.Event()

    def slow(record: Record) -> list[Sample]:
        rendered.append(record)
        begun.wait(5)  # until the other has come as far as the claim
        return render(record)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare_split, request, slow, cache_dir)
        while not rendered:
            threading.Event().wait(0.01)
        second = pool.submit(prepare_split, request, slow, cache_dir)
        begun.set()
        assert first.result() == second.result()
    assert len(rendered) == 2
    assert texts(first.result()) == ["?one", "?two"]


def test_shards_are_the_same_bytes_whoever_writes_them(request_for: RequestFor, tmp_path: Path) -> None:
    request = request_for([f"answer {n}" for n in range(50)], packing=True)
    for name in ("x", "y"):
        prepare_split(request, render, tmp_path / name)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in ("x", "y")]
    assert contents[0] == contents[1]
    assert sorted(name.partition(".")[2] for name in contents[0]) == ["arrow", "index.npy", "json"]


@pytest.mark.parametrize("leftover", ["arrow", "index.npy"])
def test_a_shard_without_its_description_is_made_anew(request_for: RequestFor, cache_dir: Path, leftover: str) -> None:
    request = request_for(["one", "two"])
    key = plan_split(request).shards[0].key
    cache_dir.mkdir()
    (cache_dir / f"{key}.{leftover}").write_bytes(b"")
    assert texts(prepare_split(request, render, cache_dir)) == ["?one", "?two"]


def test_a_shard_that_was_deleted_is_made_anew_though_its_split_was_complete(
    request_for: RequestFor, cache_dir: Path
) -> None:
    request = request_for(["one", "two"])
    before = prepare_split(request, render, cache_dir)
    for path in cache_dir.glob(f"{plan_split(request).shards[0].key}.*"):
        path.unlink()
    assert prepare_split(request, render, cache_dir) == before
    assert texts(before) == ["?one", "?two"]


def test_only_what_has_changed_is_made_anew(tmp_path: Path, cache_dir: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        write_source(folder / f"{name}.jsonl", [f"{name} {n}" for n in range(3)])
    source = RowSource(source=str(folder))
    listed = list_files(source)
    parts = cut_parts(listed, part_bytes=1)
    assert len(parts) >= 2
    request = SplitRequest((source,), 32, False, "k")
    before = [request.part_key(source, part, NOTHING.numbers) for part in parts]
    write_source(folder / "b.jsonl", ["changed"])
    after = [request.part_key(source, part, NOTHING.numbers) for part in cut_parts(list_files(source), part_bytes=1)]
    assert set(before) & set(after) == {key for key, part in zip(before, parts, strict=True) if "a.jsonl" in str(part)}


@pytest.mark.parametrize("long_samples", ["truncate", "drop", "split"])
def test_the_rows_of_a_slot_are_used_together_or_not_at_all(long_samples: str) -> None:
    request = SplitRequest((), 4, False, "", long_samples=long_samples, rows_per_slot=2)
    short, long = Sample([1, 2], [False, True]), Sample(list(range(8)), [False] + [True] * 7)
    untrained = Sample([1, 2], [False, False])
    assert fit([short, short], ROW, request)[0] == [short, short]
    kept, counts = fit([short, untrained], ROW, request)
    assert (kept, counts.num_untrained_rows) == ([], 1)
    assert fit([short], ROW, request)[0] == []
    # A split sample has two pieces, and which of them would be compared with the other answer?
    kept = [short, Sample(long.input_ids[:4], long.trained[:4])] if long_samples == "truncate" else []
    assert fit([short, long], ROW, request)[0] == kept
    assert fit([untrained, long], ROW, request)[0] == []

"""Preparing a split: once per content and settings, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ft.config.schema import RowSource
from dist_ft.errors import DataError
from dist_ft.records import Conversation, Record, Sample
from dist_ft.stream import cache
from dist_ft.stream.cache import PreparedSplit, SplitRequest, prepare_split
from dist_ft.stream.left_out import QUARANTINE
from tests.helpers.shards import places


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


def texts(split: PreparedSplit) -> list[str]:
    """Every sequence as text, the user's `?` included."""
    shards = split.open()
    return ["".join(map(chr, shards.read(*place)[0])) for place in places(shards)]


RequestFor = Callable[..., SplitRequest]


def test_a_split_holds_every_row_and_counts_it(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["one", "two", "three"]), render, cache_dir)
    assert texts(split) == ["?one", "?two", "?three"]
    assert asdict(split) == {
        "directory": str(cache_dir / split.key), "key": split.key, "num_shards": 1, "num_rows": 3,
        "num_sequences": 3, "num_tokens": 14, "num_trained_tokens": 11, "num_untrained_rows": 0,
        "num_long_samples": 0, "num_bad_rows": 0, "max_tokens": 6, "max_trained_tokens": 5,
    }  # fmt: skip
    assert split.open().sizes(0, np.array([2])).tolist() == [[6, 5]]


def test_packed_rows_are_all_there(request_for: RequestFor, cache_dir: Path) -> None:
    answers = [chr(ord("a") + n) * (1 + n % 9) for n in range(26)]
    split = prepare_split(request_for(answers, packing=True, seq_len=16), render, cache_dir)
    shards = split.open()
    found = []
    for place in places(shards):
        ids, trained, starts = shards.read(*place)
        assert len(ids) <= 16
        assert not trained[starts].any()
        found += [
            "".join(map(chr, part)) for part in (ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True))
        ]
    assert sorted(found) == [f"?{answer}" for answer in answers]
    assert split.num_sequences < len(answers) == split.num_rows


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
        {"held_out": 0.1, "take_held_out": True}, {"group_by": "id"}, {"long_samples": "drop"}, {"bad_rows": "skip"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_is_in_the_key(request_for: RequestFor, change: dict[str, Any]) -> None:
    request = request_for(["one"])
    assert replace(request, **change).key() != request.key()


@pytest.mark.parametrize("change", [{"format": "messages"}, {"columns": {"messages": "dialog"}}], ids=str)
def test_how_rows_are_read_is_in_the_key(request_for: RequestFor, change: dict[str, Any]) -> None:
    request = request_for(["one"])
    other = request.sources[0].model_copy(update=change)
    assert replace(request, sources=(other,)).key() != request.key()
    assert replace(request, sources=request.sources * 2).key() != request.key()


def test_no_setting_was_forgotten_in_the_table_above() -> None:
    assert set(SplitRequest.__dataclass_fields__) == {
        "sources", "seq_len", "packing", "render_key", "held_out", "take_held_out", "group_by", "long_samples",
        "bad_rows",
    }  # fmt: skip


def test_both_sides_of_a_held_out_split_have_their_own_key(request_for: RequestFor) -> None:
    request = request_for(["one"], held_out=0.1)
    assert replace(request, take_held_out=True).key() != request.key()


def test_the_key_is_of_content_not_of_the_path(request_for: RequestFor, tmp_path: Path, cache_dir: Path) -> None:
    request = request_for(["one", "two"])
    moved = replace(request, sources=(RowSource(source=str(shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))),))
    assert moved.key() == request.key()
    assert request_for(["one", "two!"]).key() != moved.key()
    assert prepare_split(moved, render, cache_dir).key == moved.key()


def test_the_version_of_preparation_is_in_the_key(request_for: RequestFor, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(["one"])
    keys = {request.key()}
    for name in ("PREPARATION_VERSION", "WINDOW_ROWS"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, 99)
            keys.add(request.key())
    assert len(keys) == 3


def test_rows_without_a_trained_token_are_left_out_and_counted(request_for: RequestFor, cache_dir: Path) -> None:
    # An empty answer, and one that lies wholly beyond the cut.
    request = request_for(["good", "", "fine"], seq_len=8)
    late = {"messages": [{"role": "user", "content": "x" * 8}, {"role": "assistant", "content": "late"}]}
    append(request, json.dumps(late))
    split = prepare_split(request, render, cache_dir)
    assert texts(split) == ["?good", "?fine"]
    assert (split.num_rows, split.num_untrained_rows, split.num_long_samples) == (4, 2, 1)


def test_a_long_sample_is_cut_at_the_end(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["123456789", "12"], seq_len=8), render, cache_dir)
    assert texts(split) == ["?1234567", "?12"]
    assert split.num_long_samples == 1


@pytest.mark.parametrize(
    "render_nothing", [lambda _: [], lambda _: [Sample([], [])], lambda _: [Sample([1, 2], [True, False])]]
)
def test_a_split_without_a_trained_token_is_refused(
    request_for: RequestFor, cache_dir: Path, render_nothing: cache.Render
) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: none of 2 rows has a trained token"):
        prepare_split(request_for(["one", "two"]), render_nothing, cache_dir)
    assert not cache_dir.exists() or not list(cache_dir.iterdir())


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
    assert (split.num_rows, split.num_long_samples, split.num_untrained_rows) == (3, 1, 0)
    # Nothing precedes the first token of a piece.
    assert split.num_trained_tokens == sum(len(text) - 1 for text in expected)


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
    assert (split.num_rows, split.num_bad_rows) == (3, 3)
    text = (Path(split.directory) / QUARANTINE).read_text()
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
    assert not cache_dir.exists() or not list(cache_dir.iterdir())


def test_a_bad_row_counts_on_one_side_only(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for([f"answer {n}" for n in range(20)], held_out=0.5, bad_rows="skip")
    append(request, "broken\n")
    sides = [prepare_split(replace(request, take_held_out=take), render, cache_dir) for take in (False, True)]
    assert [split.num_bad_rows for split in sides] == [1, 0]
    assert [(Path(split.directory) / QUARANTINE).exists() for split in sides] == [True, False]


def test_windows_become_shards_and_packing_never_looks_beyond(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WINDOW_ROWS", 4)
    answers = [chr(ord("a") + n) * 3 for n in range(10)]
    split = prepare_split(request_for(answers, packing=True, seq_len=8), render, cache_dir)
    assert split.num_shards == 3
    assert split.open().num_sequences(np.arange(3)).tolist() == [2, 2, 1]
    assert texts(split) == ["?aaa?bbb", "?ccc?ddd", "?eee?fff", "?ggg?hhh", "?iii?jjj"]


def test_a_window_without_a_usable_row_makes_no_shard(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WINDOW_ROWS", 2)
    split = prepare_split(request_for(["a", "b", "", "", "c", "d"]), render, cache_dir)
    assert split.open().num_sequences(np.arange(2)).tolist() == [2, 2]
    assert texts(split) == ["?a", "?b", "?c", "?d"]


def test_a_row_may_become_several_samples(request_for: RequestFor, cache_dir: Path) -> None:
    split = prepare_split(request_for(["one", "two"]), lambda record: render(record) * 2, cache_dir)
    assert texts(split) == ["?one", "?one", "?two", "?two"]
    assert split.num_rows == 2


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_dying_half_way_leaves_nothing_behind(
    request_for: RequestFor, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    monkeypatch.setattr(cache, "WINDOW_ROWS", 2)  # the first shard is on disk before the third row
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
    assert not cache_dir.exists() or not list(cache_dir.iterdir())
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
    assert not cache_dir.exists() or not list(cache_dir.iterdir())


def test_of_two_writers_at_once_both_get_the_split(request_for: RequestFor, cache_dir: Path) -> None:
    request = request_for(["one", "two"])
    other: list[PreparedSplit] = []

    def slow(record: Record) -> list[Sample]:
        if not other:
            other.append(prepare_split(request, render, cache_dir))
        return render(record)

    assert prepare_split(request, slow, cache_dir) == other[0]
    assert [path.name for path in cache_dir.iterdir()] == [request.key()]
    assert texts(other[0]) == ["?one", "?two"]


def test_shards_are_the_same_bytes_whoever_writes_them(request_for: RequestFor, tmp_path: Path) -> None:
    request = request_for([f"answer {n}" for n in range(50)], packing=True)
    splits = [prepare_split(request, render, tmp_path / name) for name in ("x", "y")]
    contents = [{p.name: p.read_bytes() for p in Path(s.directory).glob("shard-*")} for s in splits]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3


@pytest.mark.parametrize("leftover", [None, "shard-00000.arrow"])
def test_a_directory_without_its_last_file_is_made_anew(
    request_for: RequestFor, cache_dir: Path, leftover: str | None
) -> None:
    request = request_for(["one", "two"])
    (cache_dir / request.key()).mkdir(parents=True)
    if leftover:
        (cache_dir / request.key() / leftover).write_bytes(b"")
    assert texts(prepare_split(request, render, cache_dir)) == ["?one", "?two"]

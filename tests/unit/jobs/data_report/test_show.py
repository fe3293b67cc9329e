"""What `data show` reads back from the token shards, against the shards and the rows that they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_ft.config import Config
from dist_ft.data.shards import request
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import UsageError
from dist_ft.jobs.data_report import show
from dist_ft.jobs.data_report.show import show_data
from dist_ft.model.embedded import byte_tokenizer
from tests.helpers.configs import preference_config, tiny_config
from tests.helpers.splits import prepared_splits


def conversation(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]})


@pytest.fixture
def config_for(tmp_path: Path) -> Callable[..., Config]:
    def make(*lines: str, **changes: Any) -> Config:
        (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        source = {"source": str(tmp_path / "a.jsonl")}
        return tiny_config(tmp_path, **{"data__train": [source], "data__eval": None, **changes})

    return make


ConfigFor = Callable[..., Config]


def shown_of(config: Config, source: str, first: int, count: int) -> dict[str, Any]:
    """What `data show --json` prints."""
    return dict(json.loads(json.dumps(asdict(show_data(config, source, first, count)))))


def kinds(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Each segment as its text and `t` for trained, `s` for special."""
    return [
        (segment["text"], "t" * segment["is_trained"] + "s" * segment["is_special"]) for segment in sample["segments"]
    ]


def test_each_token_is_shown_with_what_it_is(config_for: ConfigFor) -> None:
    shown = shown_of(config_for(conversation("hé?", "ja ✓")), "0", 1, 3)
    (sequence,) = shown["sequences"]
    (sample,) = sequence["samples"]
    assert kinds(sample) == [
        ("<|im_start|>", "s"), ("user\nhé?", ""), ("<|im_end|>", "s"), ("\n", ""),
        ("<|im_start|>", "s"), ("assistant\n", ""), ("ja ✓", "t"), ("<|im_end|>", "ts"), ("\n", ""),
    ]  # fmt: skip
    assert sum(segment["num_tokens"] for segment in sample["segments"]) == len(sample["input_ids"])


@pytest.mark.parametrize(
    ("objective", "names"),
    [({"kind": "dpo"}, ["chosen", "rejected"]), ({"kind": "kto"}, ["answer", "mismatched answer"])],
)
def test_samples_of_a_record_say_what_they_are(tmp_path: Path, objective: dict[str, Any], names: list[str]) -> None:
    config = preference_config(tmp_path, objective, data__packing=True)
    (sequence, *_) = shown_of(config, "0", 1, 1)["sequences"]
    samples = sequence["samples"]
    assert len(samples) > 2
    assert [sample["role"] for sample in samples] == names * (len(samples) // 2)
    assert [sample["place"] for sample in samples[::2]] == [sample["place"] for sample in samples[1::2]]
    labels = [sample["numbers"] for sample in samples]
    assert all(of.keys() == ({"label"} if objective["kind"] == "kto" else set()) for of in labels)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("window_rows", [4, 8192])
def test_all_sequences_are_those_of_the_shards_and_every_sample_has_its_row(
    config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch, packing: bool, window_rows: int
) -> None:
    monkeypatch.setattr(request, "WINDOW_ROWS", window_rows)
    lines = [conversation(f"question {n} " + "x" * (n % 9), f"answer {n}") for n in range(30)]
    config = config_for(*lines, data__packing=packing, data__seq_len=160)
    split = prepared_splits(config)[0][0]
    shards = open_split(split, config.data.loader)
    assert split.num_shards == 1
    shown = shown_of(config, "0", 1, 1000)["sequences"]
    assert [sequence["row"] for sequence in shown] == list(range(1, split.known_counts.num_sequences + 1))
    for sequence in shown:
        ids, trained, starts, _ = shards.read(0, sequence["row"] - 1)
        samples = sequence["samples"]
        assert [token for sample in samples for token in sample["input_ids"]] == ids.tolist()
        assert [flag for sample in samples for flag in sample["trained"]] == trained.tolist()
        assert len(samples) == len(starts)
        for sample in samples:
            line = int(sample["place"].rsplit(":", 1)[1])
            assert any(f"question {line - 1} " in text for text, _ in kinds(sample))
    assert sum(len(sequence["samples"]) for sequence in shown) == 30
    assert any(len(sequence["samples"]) > 1 for sequence in shown) == packing


def test_part_of_the_sequences_can_be_asked_for(config_for: ConfigFor) -> None:
    config = config_for(*(conversation(str(n), "x") for n in range(9)))
    for first, count, expected in [(1, 2, [1, 2]), (5, 1, [5]), (8, 5, [8, 9])]:
        shown = shown_of(config, "0", first, count)["sequences"]
        assert [sequence["row"] for sequence in shown] == expected
        assert [sequence["samples"][0]["place"].rsplit(":", 1)[1] for sequence in shown] == list(map(str, expected))


def test_a_cut_sample_says_how_much_is_missing(config_for: ConfigFor) -> None:
    config = config_for(conversation("hi", "y" * 100), conversation("hi", "yes"), data__seq_len=64)
    cut, whole = (sequence["samples"][0] for sequence in shown_of(config, "0", 1, 2)["sequences"])
    assert (len(cut["input_ids"]), cut["num_cut_tokens"]) == (64, 123 - 64)
    assert whole["num_cut_tokens"] == 0


def test_every_piece_of_a_sample_has_its_row(config_for: ConfigFor) -> None:
    config = config_for(
        conversation("hi", "yes"), conversation("hi", "y" * 100), data__seq_len=64, data__long_samples="split"
    )
    places = [sequence["samples"][0]["place"] for sequence in shown_of(config, "0", 1, 9)["sequences"]]
    assert [place.rsplit(":", 1)[1] for place in places] == ["1", "2", "2"]


def test_rows_that_are_skipped_are_not_shown(config_for: ConfigFor) -> None:
    config = config_for("broken", conversation("hi", "yes"), "5", conversation("hi", "no"), data__bad_rows="skip")
    places = [sequence["samples"][0]["place"] for sequence in shown_of(config, "0", 1, 9)["sequences"]]
    assert [place.rsplit(":", 1)[1] for place in places] == ["2", "4"]


def test_the_held_out_side_is_shown_by_name(config_for: ConfigFor) -> None:
    lines = [conversation(f"question {n}", "x") for n in range(40)]
    config = config_for(*lines, data__eval=0.5)
    sides = [shown_of(config, source, 1, 100) for source in ("0", "eval")]
    places = [{s["samples"][0]["place"] for s in side["sequences"]} for side in sides]
    assert [side["split"] for side in sides] == ["train.0", "eval"]
    assert not places[0] & places[1]
    assert len(places[0] | places[1]) == 40


@pytest.mark.parametrize(
    ("source", "row", "says"),
    [
        ("1", 1, "this config has 0$"),
        ("eval", 1, "this config has 0$"),
        ("x", 1, "--source x"),
        ("0", 3, "2 sequences"),
    ],
)
def test_what_is_not_there_is_refused(config_for: ConfigFor, source: str, row: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        shown_of(config_for(conversation("a", "b"), conversation("c", "d")), source, row, 1)


def test_what_is_shown_is_json(config_for: ConfigFor) -> None:
    shown = shown_of(config_for(conversation("\x1b[31m\x00\u2028", "</script>\ud83d\ude00")), "0", 1, 1)
    assert list(shown) == [
        "source", "split", "seq_len", "num_rows", "num_sequences", "num_tokens", "num_trained_tokens", "sequences",
    ]  # fmt: skip
    assert "</script>" in "".join(text for text, _ in kinds(shown["sequences"][0]["samples"][0]))


@given(st.text(max_size=30), st.lists(st.booleans(), min_size=1, max_size=8))
def test_segments_join_to_the_text_but_where_a_character_is_cut(text: str, trained: list[bool]) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(f"{text}<|im_end|>{text}", add_special_tokens=False)["input_ids"]
    flags = [trained[i % len(trained)] for i in range(len(ids))]
    segments = list(show._segments(tokenizer, ids, flags))
    joined = "".join(segment.text for segment in segments)
    if len(set(trained)) == 1 or text.isascii():
        assert joined == f"{text}<|im_end|>{text}"
    assert sum(segment.num_tokens for segment in segments) == len(ids)


def test_the_space_that_some_tokenizers_drop_at_the_start_is_kept() -> None:
    words = {"▁Hello": 0, "▁world": 1, "▁again": 2}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="▁Hello"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    segments = list(show._segments(tokenizer, [0, 1, 2], [False, True, True]))
    assert [segment.text for segment in segments] == ["Hello", " world again"]


def test_what_is_left_out_and_redacted_is_shown_as_it_is_trained(config_for: ConfigFor, tmp_path: Path) -> None:
    lines = [conversation(f"q{n} a@b.com", "x" * n) for n in range(1, 9)]
    changes: dict[str, Any] = {"data__curation": {"drop": [{"pattern": "q[1-5]"}]}, "data__redact": ["email"]}
    shown = shown_of(config_for(*lines, **changes), "0", 1, 9)
    samples = [sample for sequence in shown["sequences"] for sample in sequence["samples"]]
    assert [sample["place"] for sample in samples] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (6, 7, 8)]
    assert all("user\nq" in text and "<EMAIL>" in text for sample in samples for text, _ in kinds(sample)[1:2])

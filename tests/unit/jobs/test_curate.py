"""What a run leaves out of its training rows: by which rule, in which order, and that it is left out."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config
from dist_ft.data.curation.filters import Curation
from dist_ft.data.shards.split import describe_omissions
from dist_ft.data.sources.listing import list_sources
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import DataError
from dist_ft.jobs import curate as module
from dist_ft.jobs.prepare import prepare
from dist_ft.model.base import load_tokenizer
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import config_of, tiny_config
from tests.helpers.splits import prepared_splits

Write = Callable[..., str]
WORDS = [f"word{n}" for n in range(3000)]


def chat(question: str, answer: str = "yes") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def prose(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=60))


def curate(config: Config) -> Curation:
    """Anew each time: with a store of its own."""
    return module.curate(config, list_sources(config.data), LocalStore(Path(config.run.output_dir) / uuid.uuid4().hex))


def dropped(config: Config) -> list[list[int]]:
    return [removed.numbers.tolist() for removed in curate(config).sources]


def test_a_config_that_asks_for_nothing_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "scan_part", lambda *_: pytest.fail("read"))
    assert dropped(tiny_config(tmp_path)) == [[]]


def test_numbers_count_bad_rows_and_go_over_all_files_of_a_source(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "1.jsonl").write_text("\n".join(["broken", chat("a"), chat("a")]))
    (folder / "2.jsonl").write_text("\n".join([chat("b"), "[]", chat("a")]))
    config = config_of(tmp_path, str(folder), data__curation={"exact": True}, data__bad_rows="skip")
    (removed,) = curate(config).sources
    assert removed.numbers.tolist() == [2, 5]
    assert removed.first == {"exact": [f"{folder}/1.jsonl:3", f"{folder}/2.jsonl:3"]}


def test_exact_copies_go_over_all_sources_and_the_first_stays(tmp_path: Path, write: Write) -> None:
    a, b = write(chat("a"), chat("b"), chat("a")), write(chat("c"), chat("b"), chat("c"), name="b.jsonl")
    assert dropped(config_of(tmp_path, a, b, data__curation={"exact": True})) == [[2], [1, 2]]


def test_near_copies_go_and_the_first_stays(tmp_path: Path, write: Write) -> None:
    lines = [chat(prose(seed)) for seed in range(50)]
    lines += [chat(prose(seed).replace("word1", "wort1", 1)) for seed in range(0, 50, 10)]
    config = config_of(tmp_path, write(*lines), data__curation={"near": 0.8})
    assert dropped(config) == [[50, 51, 52, 53, 54]]
    assert curate(config).sources[0].counts == {"near": 5}


def test_of_a_row_that_more_than_one_rule_removes_the_first_counts(tmp_path: Path, write: Write) -> None:
    source = write(chat("drop me"), chat("drop me"), chat(prose(1)), chat(prose(1)), chat(prose(1) + " end"), chat("q"))
    curation = {"drop": [{"pattern": "drop"}], "exact": True, "near": 0.8}
    (removed,) = curate(config_of(tmp_path, source, data__curation=curation)).sources
    assert (removed.numbers.tolist(), removed.counts) == ([0, 1, 3, 4], {"drop.0": 2, "exact": 1, "near": 1})


@pytest.mark.parametrize("near", [None, 0.8])
def test_training_rows_that_are_held_out_rows_go(tmp_path: Path, write: Write, near: float | None) -> None:
    source = write(chat(prose(1)), chat(prose(2)), chat(prose(3).replace("word2", "wort2", 1)), chat(prose(1)))
    held_out = write(chat(prose(1)), chat(prose(3)), chat(prose(4)), name="e.jsonl")
    curation = {"against_eval": True, "near": near}
    config = config_of(tmp_path, source, data__eval=held_out, data__curation=curation)
    assert dropped(config) == [[0, 3] if near is None else [0, 2, 3]]
    assert curate(config).sources[0].counts == {"against_eval": 2 if near is None else 3}


def test_held_out_rows_of_a_fraction_are_never_touched(tmp_path: Path, write: Write) -> None:
    lines = [chat(f"{n} " + prose(n), "no" if n % 3 else "yes") for n in range(60)]
    plain = config_of(tmp_path, write(*lines, *lines), data__eval=0.3, data__seq_len=800)
    curation = {"exact": True, "require": [{"pattern": "yes", "role": "assistant"}], "against_eval": True}
    config = config_of(tmp_path, write(*lines, *lines), data__eval=0.3, data__seq_len=800, data__curation=curation)
    (train,), held_out = prepared_splits(config)
    (all_of_train,), all_held_out = prepared_splits(plain)
    assert held_out == all_held_out and held_out is not None
    assert held_out.known_counts.num_rows + all_of_train.known_counts.num_rows == 120
    assert train.known_counts.num_rows + sum(train.removed_rows.values()) == all_of_train.known_counts.num_rows
    assert train.removed_rows.keys() == {"require.0", "exact"}


def test_near_held_out_rows_of_a_fraction_push_training_rows_out(tmp_path: Path, write: Write) -> None:
    lines = [chat(prose(n)) for n in range(80)] + [chat(prose(n) + " end") for n in range(80)]
    config = config_of(tmp_path, write(*lines), data__eval=0.5, data__curation={"against_eval": True, "near": 0.8})
    (removed,) = curate(config).sources
    assert removed.counts["against_eval"] > 20 and removed.counts["near"] > 10
    assert removed.counts.keys() == {"against_eval", "near"}


def test_a_cap_takes_a_sample_that_does_not_follow_the_order_of_the_file(tmp_path: Path, write: Write) -> None:
    lines = [chat(f"question {n}") for n in range(100)]

    def kept(lines: list[str], max_rows: int) -> set[str]:
        source = write(*lines)
        (numbers,) = dropped(config_of(tmp_path, {"source": source, "max_rows": max_rows}))
        return {line for number, line in enumerate(lines) if number not in numbers}

    sample = kept(lines, 30)
    assert len(sample) == 30 and sample != set(lines[:30])
    assert kept(random.Random(0).sample(lines, 100), 30) == sample
    assert kept(lines, 20) < sample
    assert kept(lines, 100) == kept(lines, 1000) == set(lines)


def test_a_cap_counts_what_the_other_rules_leave(tmp_path: Path, write: Write) -> None:
    a, b = write(*[chat("same")] * 50, chat("x"), chat("y")), write(chat("z"), chat("x"), name="b.jsonl")
    config = config_of(tmp_path, {"source": a, "max_rows": 2}, b, data__curation={"exact": True})
    first, second = curate(config).sources
    assert (first.counts, second.counts) == ({"exact": 49, "max_rows": 1}, {"exact": 1})


def test_the_selection_is_the_same_every_time(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [chat(prose(n % 70) + (" end" if n % 3 else "")) for n in range(300)]
    config = config_of(tmp_path, {"source": write(*lines), "max_rows": 40}, data__curation={"exact": True, "near": 0.8})
    first = curate(config)
    monkeypatch.setattr("dist_ft.data.curation.near._BATCH_ROWS", 7)
    monkeypatch.setattr("dist_ft.data.curation.near._PAIRS", 5)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    assert dropped(config) == [removed.numbers.tolist() for removed in first.sources]
    assert first.sources[0].counts == {"exact": 160, "near": 70, "max_rows": 30}


def test_a_run_prepares_what_is_left_and_says_what_is_not(tmp_path: Path, write: Write) -> None:
    source = write(*[chat("a")] * 5, chat("b"), chat("a rather long question"))
    config = config_of(tmp_path, source, data__curation={"exact": True, "max_characters": 20})
    (split,) = prepare(config).inputs.splits
    assert (split.known_counts.num_rows, split.removed_rows) == (2, {"max_characters": 1, "exact": 4})
    assert describe_omissions([split, split], None, config.data) == [
        "10 rows are left out by data.curation and max_rows: max_characters 2, exact 8"
    ]


def test_what_is_left_out_is_in_the_fingerprint(tmp_path: Path, write: Write) -> None:
    source = write(chat("a"), chat("a"), chat("b"))
    curations: list[dict[str, Any]] = [{}, {"exact": True}, {"drop": [{"pattern": "b"}]}]
    runs = [prepare(config_of(tmp_path, source, data__curation=c)) for c in curations]
    assert len({prepared.inputs.fingerprint.data for prepared in runs}) == 3


def test_a_rule_that_removes_nothing_leaves_the_prepared_data_as_it_was(tmp_path: Path, write: Write) -> None:
    source = write(chat("a"), chat("b"))
    keys = set()
    for curation in ({}, {"exact": True}, {"min_turns": 1}):
        config = config_of(tmp_path, source, data__curation=curation)
        keys.add(prepared_splits(config)[0][0].key)
    assert len(keys) == 1


def test_rules_that_leave_nothing_are_an_error_that_names_them(tmp_path: Path, write: Write) -> None:
    config = config_of(tmp_path, write(chat("a")), data__curation={"min_characters": 100})
    with pytest.raises(DataError, match="min_characters 1"):
        prepared_splits(config)


def test_redacted_rows_are_other_data_with_the_same_turns(tmp_path: Path, write: Write) -> None:
    source = write(chat("I am a@b.com", "Hello a@b.com"), chat("a", "b"))
    ((plain,), _), ((redacted,), _) = (
        prepared_splits(config)
        for config in (config_of(tmp_path, source), config_of(tmp_path, source, data__redact=["email"]))
    )
    tokenizer = load_tokenizer(config_of(tmp_path, source))
    assert plain.key != redacted.key
    ids, trained, *_ = open_split(redacted, config_of(tmp_path, source).data.loader).read(0, 0)
    texts = [tokenizer.decode(ids[trained == is_trained]) for is_trained in (True, False)]
    assert texts[0].startswith("Hello <EMAIL>") and "I am <EMAIL>" in texts[1]
    assert plain.known_counts.num_rows == redacted.known_counts.num_rows == 2

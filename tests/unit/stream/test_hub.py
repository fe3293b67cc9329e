"""Which files make up a source: a file, a folder, or a Hugging Face data set by path and by id."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_ft.config.schema import RowSource
from dist_ft.errors import DataError
from dist_ft.stream.hub import find_files
from dist_ft.stream.sources import content_hash, read_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: chats
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: more
  data_files: more/*.jsonl
---
# A data set
"""


def talk(name: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]}


def make_dataset(root: Path, card: str | None = CARD) -> Path:
    (root / "data").mkdir(parents=True)
    (root / "more").mkdir()
    if card:
        (root / "README.md").write_text(card)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist([talk(f"{name} {n}") for n in range(3)]), root / "data" / f"{name}.parquet")
    (root / "more" / "a.jsonl").write_text(json.dumps(talk("more")) + "\n")
    return root


def asked(source: str, **settings: Any) -> list[str]:
    return [row.record.messages[0]["content"] for row in read_rows(RowSource(source=source, **settings))]


TRAIN = [f"train-0000{shard}-of-00002 {n}" for shard in range(2) for n in range(3)]


def test_a_data_set_reads_by_path(tmp_path: Path) -> None:
    root = str(make_dataset(tmp_path / "set"))
    assert asked(root) == TRAIN
    assert asked(root, split="test") == [f"test-00000-of-00001 {n}" for n in range(3)]
    assert asked(root, name="more") == ["more"]
    first = next(read_rows(RowSource(source=root)))
    assert first.place == f"{root}/data/train-00000-of-00002.parquet: row 1"


def test_without_a_card_the_names_of_files_tell_the_split(tmp_path: Path) -> None:
    root = str(make_dataset(tmp_path / "set", card=None))
    assert asked(root) == TRAIN
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(talk(name)) + "\n")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("my_train", "my_test"):
        (flat / f"{name}.jsonl").write_text(json.dumps(talk(name)) + "\n")
    assert asked(str(flat)) == ["my_train"]
    assert asked(str(flat), split="test") == ["my_test"]


def test_a_folder_of_files_is_read_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(talk(name)) + "\n")
    (tmp_path / ".hidden").write_text("x")
    assert asked(str(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "holds no files"),
        (["a.jsonl", "b.csv"], "holds jsonl and csv files; keep one kind"),
        (["a.jsonl", "LICENSE"], "LICENSE: unknown kind of file"),
        (["x-00000-of-00003.jsonl", "x-00002-of-00003.jsonl"], "has 2 of 3 shards, number 1 is missing"),
    ],
)
def test_a_folder_that_is_no_source_is_refused(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=says):
        find_files(RowSource(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "validation"}, "has no split 'validation', but ['test', 'train']; set split"),
        ({"name": "none"}, "'none' not found"),
    ],
)
def test_a_split_or_configuration_that_is_not_there_is_refused(
    tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    root = make_dataset(tmp_path / "set")
    with pytest.raises(DataError, match=re.escape(says)):
        find_files(RowSource(source=str(root), **settings))


@pytest.mark.parametrize("path", ["../secret.jsonl", "{tmp_path}/secret.jsonl"])
def test_a_card_cannot_name_files_outside(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps(talk("secret")))
    card = f"---\nconfigs:\n- config_name: a\n  data_files: {path.format(tmp_path=tmp_path)}\n---\n"
    root = make_dataset(tmp_path / "set", card)
    with pytest.raises(DataError, match="lies outside of it"):
        find_files(RowSource(source=str(root)))


def test_a_missing_shard_of_a_data_set_is_noticed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    (root / "data" / "train-00003-of-00004.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="missing"):
        find_files(RowSource(source=str(root)))


_READ = """
import sys, json
from dist_ft.config.schema import RowSource
from dist_ft.errors import DataError
from dist_ft.stream.sources import content_hash, read_rows
source = RowSource(**json.loads(sys.argv[1]))
try:
    rows = [row.record.messages[0]["content"] for row in read_rows(source)]
    print(json.dumps([rows, content_hash(source), "torch" in sys.modules]))
except DataError as error:
    print(error)
"""


def read_elsewhere(cache: Path, **source: str) -> str:
    """Reads a source in a process of its own: the hub's libraries look at the environment once, when imported."""
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _READ, json.dumps(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)
    return done.stdout.strip()


def test_a_data_set_in_the_hubs_cache_reads_by_id_as_by_path(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--org--chats"
    root = make_dataset(repository / "snapshots" / COMMIT)
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    rows, by_id, has_torch = json.loads(read_elsewhere(tmp_path, source="org/chats"))
    assert rows == asked(str(root)) == TRAIN
    assert by_id == content_hash(RowSource(source=str(root)))
    assert not has_torch
    assert json.loads(read_elsewhere(tmp_path, source="org/chats", revision=COMMIT, split="test"))[0][0].startswith(
        "te"
    )


def test_offline_an_id_is_an_error_of_one_line_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    message = read_elsewhere(tmp_path, source="org/chats")
    assert time.monotonic() - began < 30
    assert len(message.splitlines()) == 1
    for words in ("org/chats", str(tmp_path / "hub"), "HF_HUB_OFFLINE"):
        assert words in message

"""Which files make up a source: a file, a folder, or a Hugging Face data set by path and by id."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import read_rows
from dist_ft.data.sources.hub_files import find_files
from dist_ft.data.sources.listing import list_files
from dist_ft.errors import DataError
from tests.unit.data.sources.test_readers import write_arrow_stream

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
        list_files(RowSource(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "validation"}, "has no split 'validation', but 'test', 'train'; set split"),
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


@pytest.mark.parametrize(
    "card",
    [
        "---\n: [\n---\n",
        "---\nconfigs: 5\n---\n",
        "---\nconfigs:\n- 5\n---\n",
        "---\nconfigs:\n- config_name: a\n  data_files: [{split: '\\e[2J', path: none/*}]\n---\n",
        '---\nconfigs:\n- config_name: a\n  data_files: [{split: "\\e[2J", path: data/*}]\n---\n',
    ],
)
def test_a_card_that_nobody_understands_is_one_error(tmp_path: Path, card: str) -> None:
    root = make_dataset(tmp_path / "set", card)
    with pytest.raises(DataError) as caught:
        find_files(RowSource(source=str(root)))
    assert str(root) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_missing_shard_of_a_data_set_is_noticed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    shard = root / "data" / "train-00000-of-00002.parquet"
    (root / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of 2 shards, number 1 is missing"):
        list_files(RowSource(source=str(root)))
    assert asked(str(shard)) == TRAIN[:3]


def save_to_disk(folder: Path, names: list[str]) -> None:
    """As `Dataset.save_to_disk` of the `datasets` library lays it out."""
    folder.mkdir(parents=True)
    for name in names:
        write_arrow_stream(folder / name, [talk(name)])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_what_the_library_has_saved_is_read(tmp_path: Path) -> None:
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    save_to_disk(tmp_path / "train", names)
    save_to_disk(tmp_path / "test", ["data-00000-of-00001.arrow"])
    assert asked(str(tmp_path / "train")) == names
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert asked(str(tmp_path)) == names
    assert asked(str(tmp_path), split="test") == ["data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match="has no split 'dev', but 'test', 'train'"):
        asked(str(tmp_path), split="dev")


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": [{}]}', '{"_data_files": [{"filename": "../a.arrow"}]}'])
def test_a_damaged_saved_data_set_is_refused(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json"):
        find_files(RowSource(source=str(tmp_path)))

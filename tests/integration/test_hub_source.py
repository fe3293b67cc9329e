"""A data set fetched by id from a hub, and read again when there is none: real client libraries, a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.config.data_sections import RowSource
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import whole
from tests.helpers.dataset_hub import COMMIT, serve_dataset
from tests.unit.data.sources.test_dataset_hub import TRAIN, make_dataset

NO_HUB = "http://127.0.0.1:9"
READ = """
import sys, json
from dist_ft.config.data_sections import RowSource
from dist_ft.errors import DataError
from dist_ft.data.rows.scan import read_rows
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import whole
source = RowSource(**json.loads(sys.argv[1]))
try:
    rows = [row.record.messages[0]["content"] for row in read_rows(source)]
    print(json.dumps([rows, whole(list_files(source)).identity(), "torch" in sys.modules]))
except DataError as error:
    print(error)
"""


def read(home: Path, endpoint: str, is_offline: bool = False, **source: str) -> str:
    """Reads in a process of its own: the hub's libraries look at the environment once, when they are imported."""
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(is_offline))}
    command = [sys.executable, "-c", READ, json.dumps({"source": "org/chats", **source})]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env).stdout.strip()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("hub") / "set")


def test_a_fetched_split_reads_again_without_a_hub_and_a_part_is_never_the_whole(tmp_path: Path, dataset: Path) -> None:
    with serve_dataset(dataset, "org/chats") as endpoint:
        online = read(tmp_path, endpoint)
    rows, by_id, _ = json.loads(online)
    assert rows == TRAIN
    assert by_id == whole(list_files(RowSource(source=str(dataset)))).identity()
    assert read(tmp_path, NO_HUB) == online
    other = read(tmp_path, NO_HUB, split="test")
    assert "org/chats is no path here and not wholly in the cache" in other
    assert len(other.splitlines()) == 1


def test_what_the_hub_does_not_have_is_an_error_of_one_line(tmp_path: Path, dataset: Path) -> None:
    with serve_dataset(dataset, "org/chats") as endpoint:
        unknown = read(tmp_path, endpoint, source="org/none")
        no_split = read(tmp_path, endpoint, split="validation")
    assert "org/none is no data set that can be read" in unknown
    assert "HF_TOKEN" in unknown
    assert "org/chats has no split 'validation', but 'test', 'train'" in no_split
    assert len(unknown.splitlines()) == len(no_split.splitlines()) == 1


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
    rows, by_id, has_torch = json.loads(read(tmp_path, NO_HUB, is_offline=True))
    assert rows == TRAIN
    assert by_id == whole(list_files(RowSource(source=str(root)))).identity()
    assert not has_torch
    assert json.loads(read(tmp_path, NO_HUB, is_offline=True, revision=COMMIT, split="test"))[0][0].startswith("te")


def test_offline_an_id_is_an_error_of_one_line_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    message = read(tmp_path, NO_HUB, is_offline=True)
    assert time.monotonic() - began < 30
    assert len(message.splitlines()) == 1
    for words in ("org/chats", str(tmp_path / "hub"), "HF_HUB_OFFLINE"):
        assert words in message

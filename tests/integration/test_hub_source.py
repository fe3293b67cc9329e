"""A data set fetched by id from a hub, and read again when there is none: real client libraries, a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.config.schema import RowSource
from dist_ft.stream.sources import content_hash
from tests.helpers.hub import serve_dataset
from tests.unit.stream.test_hub import READ, TRAIN, make_dataset

NO_HUB = "http://127.0.0.1:9"


def read(home: Path, endpoint: str, **source: str) -> str:
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
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
    assert by_id == content_hash(RowSource(source=str(dataset)))
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

"""The service with its store in a bucket: all but keys outlives the machine, and runs find their files there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dist_ft.errors import UsageError
from dist_ft.service.api_server import Settings, depot_of, open_index
from tests.helpers.api_server import ENDS, ApiServer, api_server, chat_rows, wait_for, wait_until
from tests.helpers.fake_train import WAITS
from tests.helpers.s3 import S3Server, s3_server

CHAT = chat_rows(12)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return f"{s3.new_bucket()}/service"


def told_by(server: ApiServer, jobs: list[str], file: str) -> list[object]:
    """Returns all that a client sees."""
    client = server.client()
    return [
        [client.fine_tuning.jobs.retrieve(job).model_dump() for job in jobs],
        [[event.model_dump() for event in client.fine_tuning.jobs.list_events(job, limit=100)] for job in jobs],
        [[point.model_dump() for point in client.fine_tuning.jobs.checkpoints.list(job)] for job in jobs],
        [model.id for model in client.models.list()],
        [stored.model_dump() for stored in client.files.list()],
        client.files.content(file).read(),
    ]


def test_a_machine_that_is_lost_takes_nothing_with_it_but_the_keys(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    with api_server(bucket, scratch=tmp_path) as server:
        client = server.client()
        file = client.files.create(file=("chat.jsonl", CHAT), purpose="fine-tune").id
        made = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, validation_file=file)
        job = wait_until(client, made.id, *ENDS)
        assert job.status == "succeeded", job.error
        config = yaml.safe_load((server.store / "jobs" / job.id / "config.yaml").read_text())
        [source] = config["data"]["train"]
        assert config["run"]["output_dir"] == f"{bucket}/runs"
        assert source["source"] == f"{bucket}/jobs/{job.id}/train.jsonl"
        assert s3.object(source["source"]) == CHAT
        result = job.result_files[0]
        csv = client.files.content(result).read()
        assert csv.startswith(b"step,train_loss")
        weights = client.get(f"/fine_tuning/jobs/{job.id}/weights", cast_to=object)
        again = client.fine_tuning.jobs.create(model=str(job.fine_tuned_model), training_file=file)
        wait_until(client, again.id, *ENDS)  # what the stand-in has written is no model, but it is here
        start = yaml.safe_load((server.store / "jobs" / again.id / "config.yaml").read_text())["model"]["name"]
        assert [(path.name, path.read_bytes()) for path in Path(start).iterdir()] == [("model.safetensors", b"weights")]
        before = told_by(server, [job.id, again.id], file)
        deleted = client.files.create(file=("gone.jsonl", CHAT), purpose="fine-tune").id
        client.files.delete(deleted)
        assert not [name for name in s3.names(bucket) if deleted in name]
        here = server.store
    shutil.rmtree(here)
    with api_server(bucket, scratch=tmp_path) as server:
        assert told_by(server, [job.id, again.id], file) == before
        client = server.client()
        assert client.files.content(result).read() == csv
        assert client.get(f"/fine_tuning/jobs/{job.id}/weights", cast_to=object) == weights
        client.models.delete(str(job.fine_tuned_model))
        assert not [name for name in s3.names(bucket) if f"{job.id}/exports" in name]


def test_a_job_that_is_paused_goes_on_from_the_bucket_on_another_machine(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    with api_server(bucket, scratch=tmp_path) as server:
        client = server.client()
        file = client.files.create(file=("chat.jsonl", CHAT), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, seed=WAITS).id
        wait_for(lambda: client.fine_tuning.jobs.retrieve(job).model_extra["dist_ft"]["step"])  # type: ignore[index]
        client.fine_tuning.jobs.pause(job)
        step = wait_until(client, job, "paused").model_extra["dist_ft"]["step"]  # type: ignore[index]
        here = server.store
    shutil.rmtree(here)
    with api_server(bucket, scratch=tmp_path) as server:
        client = server.client()
        client.fine_tuning.jobs.resume(job)
        ended = wait_until(client, job, *ENDS)
        assert ended.status == "succeeded", ended.error
        assert 0 < step < ended.model_extra["dist_ft"]["step"]  # type: ignore[index]
        lines = client.files.content(ended.result_files[0]).read().decode().splitlines()
        steps = [int(line.partition(",")[0]) for line in lines[1:]]
        assert steps == list(range(1, len(steps) + 1)), "every step once"


def test_a_store_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place, said in (
        (tmp_path / "file", "File exists"),
        ("ftp://host/x", "use s3://"),
        ("s3://", "names no bucket"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            depot_of(Settings(place))
        assert f"--store {place}" in str(caught.value)
    with pytest.raises(UsageError, match="user info") as caught:
        depot_of(Settings("s3://user:hidden@bucket/x"))
    assert "hidden" not in str(caught.value)


def test_the_index_lies_on_this_machine(bucket: str, tmp_path: Path) -> None:
    open_index(Settings(bucket)).close()
    here = depot_of(Settings(bucket)).path
    assert here.is_relative_to(tmp_path / "cache") and (here / "index.sqlite").is_file()

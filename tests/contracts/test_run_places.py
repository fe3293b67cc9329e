"""A run in a directory and a run at a URL: the same to whoever reads and writes it. The URL is moto's, on loopback."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.coordinator.recorder import Recorder
from dist_ft.errors import ExportError, StaleAttemptError, StorageError
from dist_ft.run import sync
from dist_ft.run.place import RECORDS, Run, local_copy, node_dir, open_run, published, send_logs
from dist_ft.run.state import RunRecord
from dist_ft.run.status import read_if_seen
from dist_ft.run.sync import Sender
from dist_ft.storage import retry
from dist_ft.storage.publish import read_json, write_json
from tests.helpers.rows import read_rows, step_row
from tests.helpers.s3 import Fault, S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setattr(retry, "NUM_TRIES", 2)
    monkeypatch.setattr(sync, "_LAST_TRIES", 2)
    server.faults.clear()
    return server


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"{s3.new_bucket()}/runs/r"


@pytest.fixture(params=["directory", "url"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    address = str(tmp_path / "r") if request.param == "directory" else request.getfixturevalue("url")
    return open_run(address)


def append(run: Run, name: str, *lines: str) -> None:
    run.path.mkdir(exist_ok=True)
    with (run.path / name).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def row(step: int) -> str:
    return json.dumps({"step": step, "attempt": 1}) + "\n"


def steps(run: Run) -> list[int]:
    again = open_run(run.address)
    again.fetch("metrics.jsonl")
    return [found["step"] for found in read_rows(again.metrics)]


def test_what_is_written_is_found_by_whoever_opens_the_run_later(run: Run) -> None:
    sender = Sender(run, every_s=1000)
    append(run, "metrics.jsonl", row(1), row(2))
    sender.send()
    assert steps(run) == [1, 2]
    append(run, "metrics.jsonl", row(3))
    write_json(run.run_json, {"state": "completed"})
    sender.close()
    assert steps(run) == [1, 2, 3]
    again = open_run(run.address)
    again.fetch("run.json", "config.yaml")
    assert again.run_json.exists()
    assert not again.config.exists()


def test_whoever_looks_after_a_job_reads_its_run_as_soon_as_it_is_seen(run: Run) -> None:
    assert read_if_seen(run.address) is None
    run.path.mkdir(exist_ok=True)
    write_json(run.run_json, asdict(RunRecord("r", state="running", attempt=1, step=17, max_steps=40)))
    Sender(run, every_s=1000).close()
    found = read_if_seen(run.address)
    assert found is not None and (found.record.state, found.record.step) == ("running", 17)


def test_a_run_in_a_bucket_that_this_machine_does_not_see_is_not_an_error(s3: S3Server) -> None:
    assert read_if_seen("s3://bucket-of-others/runs/r") is None
    assert read_if_seen("https://host/runs/r") is None
    assert read_if_seen(None) is None


def test_exports_are_named_by_a_link_or_a_file_with_one_line(run: Run) -> None:
    assert run.pointed_at("exports/final") is None
    for step in (10, 20):
        with published(run.address_of(run.export_name(step))) as directory:
            (directory / "model.safetensors").write_text(str(step))
            (directory / "config.json").write_text("{}")
        run.point("exports/final", f"step-{step:08d}")
    assert run.pointed_at("exports/final") == "exports/step-00000020"
    assert run.store.folders("exports") == ["exports/step-00000010", "exports/step-00000020"]
    with local_copy(run.address_of("exports/step-00000010")) as directory:
        assert (directory / "model.safetensors").read_text() == "10"
    assert run.has("exports/step-00000010") and not run.has("exports/step-00000011")
    with pytest.raises(ExportError, match="exists"), published(run.address_of("exports/step-00000010")):
        pass


def test_an_export_that_fails_is_not_there(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), published(run.address_of("exports/x")) as directory:
        (directory / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert run.store.names("") == []


def test_a_request_to_stop_is_seen_until_it_is_forgotten(run: Run) -> None:
    assert run.stop_asked_at() is None
    run.ask_to_stop({"time": 12.5})
    assert open_run(run.address).stop_asked_at() == 12.5
    run.forget_stop()
    run.forget_stop()
    assert run.stop_asked_at() is None
    run.store.put("stop-request.json", [b""])
    assert run.stop_asked_at() == math.inf


def test_logs_end_in_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ["logs/attempt-0001/rank-00000.log", "logs/attempt-0001/stacks/rank-00000.txt"]
    log = node_dir(run.address).path / names[0]
    log.parent.mkdir(parents=True)
    log.write_text("said")
    send_logs(run.address, names)
    assert run.store.names("logs") == names[:1]
    assert run.store.read(names[0]) == b"said"


def test_rows_go_up_in_segments_of_whole_lines_and_are_never_replaced(url: str) -> None:
    run = open_run(url)
    sender = Sender(run, every_s=1000)
    append(run, "metrics.jsonl", row(1), row(2)[:5])
    sender.send()
    assert steps(run) == [1]
    append(run, "metrics.jsonl", row(2)[5:])
    sender.send()
    sender.send()
    assert steps(run) == [1, 2]
    assert [name.split("/")[1][:8] for name in run.store.names("metrics.jsonl.d")] == ["00000001", "00000002"]
    sender.close()


def test_a_new_driver_goes_on_behind_the_last_segment(url: str) -> None:
    first = open_run(url)
    zombie = Sender(first, every_s=1000)
    append(first, "metrics.jsonl", row(1))
    zombie.send()
    second = open_run(url)
    second.fetch("metrics.jsonl")
    sender = Sender(second, every_s=1000)
    append(second, "metrics.jsonl", row(2))
    sender.send()
    write_json(second.run_json, {"attempt": 2})
    second.store.create_exclusive("attempts/0002.json", b"{}")
    zombie.attempt, sender.attempt = 1, 2
    append(first, "metrics.jsonl", row(9))  # it has not heard that it was overtaken
    write_json(first.run_json, {"attempt": 1})
    zombie.send()
    append(second, "metrics.jsonl", row(3))
    sender.send()
    assert sorted(steps(second)) == [1, 2, 3, 9]
    sender.close()
    zombie.close()
    assert sorted(steps(second)) == [1, 2, 3, 9]
    assert json.loads(second.store.read("run.json"))["attempt"] == 2


def test_an_overtaken_driver_leaves_the_record_of_the_newer_one(run: Run) -> None:
    books = Recorder(run, RunRecord("r", max_steps=9), [])
    books.begin_attempt(take_attempt(run.store, None), world_size=1)
    newer = open_run(run.address)
    newer.fetch(*RECORDS)
    attempt = take_attempt(newer.store, None)
    record = RunRecord("r", attempt=2, max_steps=9)
    others = Recorder(newer, record, [])
    others.begin_attempt(attempt, world_size=2)
    others.send()
    books.look_again()
    with pytest.raises(StaleAttemptError, match="attempt 2 of this run has begun elsewhere"):
        books.check_mine()
    others.finish("failed", {}, None)
    books.log_step(step_row(1))
    books.finish("completed", {}, None)
    found = open_run(run.address)
    found.fetch(*RECORDS)
    assert (read_json(found.run_json)["attempt"], read_json(found.run_json)["state"]) == (2, "failed")
    events = [row["event"] for row in read_rows(found.ledger)]
    assert events.count("attempt") == 2
    assert "completed" not in events


def test_a_coordinator_that_died_between_sending_and_noting_sends_nothing_twice(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(url)
    sender = Sender(run, every_s=1000)
    append(run, "metrics.jsonl", row(1))
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "_write_state", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sender.send()
    append(run, "metrics.jsonl", row(2))
    restarted = Sender(open_run(url, scratch=run.path), every_s=1000)
    restarted.send()
    assert steps(run) == [1, 2]
    restarted.close()


def test_rows_that_cannot_be_sent_go_with_the_next(s3: S3Server, url: str) -> None:
    run = open_run(url)
    sender = Sender(run, every_s=1000)
    append(run, "metrics.jsonl", row(1))
    s3.faults.append(Fault("503", "PUT", "metrics", times=2))
    with pytest.raises(OSError, match="metrics"):
        sender.send()
    append(run, "metrics.jsonl", row(2))
    s3.faults.append(Fault("503", "PUT", "metrics", times=1000))
    with pytest.raises(StorageError, match="did not all get to the store"):
        sender.close()
    s3.faults.clear()
    Sender(open_run(url, scratch=run.path), every_s=1000).close()
    assert steps(run) == [1, 2]


def test_what_is_hidden_stays_and_what_grows_unread_goes_at_the_end(url: str) -> None:
    run = open_run(url)
    for name in (".hidden", "wandb/run/log", "samples/step-1.jsonl"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x")
    sender = Sender(run, every_s=1000)
    sender._send_all()
    assert run.store.names("") == ["samples/step-1.jsonl"]
    sender.close()
    assert run.store.names("") == ["samples/step-1.jsonl", "wandb/run/log"]


def test_a_store_that_does_not_answer_is_one_clear_error(s3: S3Server, url: str) -> None:
    s3.faults.append(Fault("503", "GET", ".", times=1000))
    with pytest.raises(StorageError, match="the run cannot be read: s3://"):
        open_run(url).fetch(*sync.GROWING)


def test_an_export_without_room_names_the_place_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(ExportError, match=rf"cannot be written to {tmp_path}/out \(.*File too large.*\); make room"),
            published(str(tmp_path / "out")) as directory,
        ):
            save_file({"w": np.zeros(10_000, np.float32)}, directory / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []

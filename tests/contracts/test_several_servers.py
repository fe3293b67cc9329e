"""Two servers of one store: neither takes away what the other has written of a job."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.service.api_server import Settings, open_index
from dist_ft.service.depot import open_depot
from dist_ft.service.index import Index
from dist_ft.service.tuning.job_request import read_request
from dist_ft.service.tuning.job_store import JobRecord, JobStore
from dist_ft.storage.publish import read_json
from tests.helpers.api_server import ENDS, api_server, chat_rows, wait_until
from tests.helpers.fake_train import WAITS
from tests.helpers.postgres import own_postgres

TIMES = 40


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def indices(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Index, Index]]:
    def opened(database: str | None) -> tuple[Index, Index]:
        return open_index(Settings(tmp_path, database)), open_index(Settings(tmp_path, database))

    if request.param == "sqlite":
        both = opened(None)
        yield both
    else:
        with own_postgres() as database:
            both = opened(database)
            yield both
    for index in both:
        index.close()


def test_two_servers_of_one_store_do_each_job_once_and_tell_the_same(tmp_path: Path) -> None:
    with api_server(tmp_path) as one, api_server(tmp_path) as other:
        clients = [one.client(), other.client()]
        file = clients[0].files.create(file=("chat.jsonl", chat_rows(12)), purpose="fine-tune").id
        made = [
            clients[number % 2].fine_tuning.jobs.create(model="tiny-random", training_file=file).id
            for number in range(4)
        ]
        waiting = clients[0].fine_tuning.jobs.create(model="tiny-random", training_file=file, seed=WAITS).id
        wait_until(clients[1], waiting, "running")
        clients[1].fine_tuning.jobs.cancel(waiting)
        states = [wait_until(clients[0], job, *ENDS).status for job in [*made, waiting]]
        assert states == [*["succeeded"] * 4, "cancelled"]
        for job in [*made, waiting]:
            told = [[event.id for event in client.fine_tuning.jobs.list_events(job, limit=100)] for client in clients]
            messages = [event.message for event in clients[0].fine_tuning.jobs.list_events(job, limit=100)]
            assert told[0] == told[1]
            assert messages.count("Fine-tuning job started") == 1
        assert clients[1].files.content(file).read() == chat_rows(12)


def test_changes_of_two_servers_all_count(indices: tuple[Index, Index], tmp_path: Path) -> None:
    stores = [JobStore(open_depot(str(tmp_path)), index, lambda _: None) for index in indices]
    request = read_request({"model": "tiny-random", "training_file": "file-1"})
    record = JobRecord(
        "ftjob-1", "default", 1, request, "tiny-random", None, None, request.hyperparameters, "ft:tiny-random:p::1"
    )
    stores[0].add(record)
    begin = threading.Barrier(2)

    def work(store: JobStore) -> None:
        begin.wait()
        for _ in range(TIMES):
            store.change(record.id, lambda old: replace(old, num_losses=old.num_losses + 1))

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.num_losses for store in stores if (found := store.find(record.id))] == [2 * TIMES] * 2
    assert read_json(tmp_path / "jobs" / record.id / "job.json")["num_losses"] == 2 * TIMES


def test_what_a_change_tells_is_seen_with_it_or_not_at_all(indices: tuple[Index, Index], tmp_path: Path) -> None:
    ours, theirs = indices
    seen_inside: list[int] = []

    def tell(record: JobRecord) -> None:
        with ours.writing():
            ours.add_events(record.id, [{"id": "ftevent-end"}])
        seen_inside.append(len(theirs.events(record.id, None, 10)[0]))

    store = JobStore(open_depot(str(tmp_path)), ours, tell)
    request = read_request({"model": "tiny-random", "training_file": "file-1"})
    store.add(
        JobRecord("ftjob-2", "default", 1, request, "tiny-random", None, None, request.hyperparameters, "ft:x:p::2")
    )
    before = len(theirs.events("ftjob-2", None, 10)[0])
    store.change("ftjob-2", lambda old: old.ended("succeeded"))
    assert seen_inside == [before]
    assert len(theirs.events("ftjob-2", None, 10)[0]) == before + 1
    with pytest.raises(ZeroDivisionError):
        store.change("ftjob-2", lambda old: replace(old, step=1 // 0))
    found = store.find("ftjob-2")
    assert found is not None and found.status == "succeeded"

"""The service as the unchanged `openai` client sees it.

Training is a stand-in; a real run is in the integration tests.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import openai
import pytest
from openai import OpenAI

from tests.helpers.api_server import ENDS, ApiServer, api_server, chat_rows, pair_rows, wait_for, wait_until
from tests.helpers.fake_train import FAILS, WAITS
from tests.helpers.postgres import own_postgres

CHAT = chat_rows(12)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    store = tmp_path_factory.mktemp("service")
    with ExitStack() as open_until_the_end:
        database = open_until_the_end.enter_context(own_postgres()) if request.param == "postgres" else None
        yield open_until_the_end.enter_context(api_server(store, database=database))


@pytest.fixture(scope="module")
def client(server: ApiServer) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def chat_file(client: OpenAI) -> str:
    return client.files.create(file=("chat.jsonl", CHAT), purpose="fine-tune").id


def raw(server: ApiServer, client: OpenAI) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {client.api_key}"})


def test_a_file_goes_in_and_comes_back(client: OpenAI) -> None:
    made = client.files.create(
        file=("größe.jsonl", CHAT), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.object, made.filename, made.bytes, made.status) == ("file", "größe.jsonl", len(CHAT), "processed")
    assert made.expires_at == made.created_at + 3600
    assert client.files.wait_for_processing(made.id) == client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == CHAT
    deleted = client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {made.id}") as caught:
        client.files.retrieve(made.id)
    assert (caught.value.param, caught.value.code) == ("id", None)


def test_files_are_listed_in_pages_in_both_orders(server: ApiServer) -> None:
    client = server.client("pages")
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    other = client.files.create(file=("a.jsonl", CHAT), purpose="fine-tune").id
    assert [file.id for file in client.files.list(limit=2)] == [other, *reversed(made)]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [*made, other]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [other]
    first = client.files.list(limit=2, purpose="user_data")
    assert (first.has_more, first.first_id, first.last_id) == (True, made[4], made[3])  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(after="file-none")
    assert caught.value.param == "after"


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (b'{"messages":[{"content":"x"}]}\nnope\n[]\n', ["Line 1: ", "Line 2: ", "Line 3: "]),
        (b"\xff\xfe\n", ["Line 1: the line is not UTF-8"]),
        (b"", ["Line 1: the file holds no example"]),
        (CHAT + pair_rows(1), ["Line 13: "]),
        (b'{"messages":[{"role":"user","content":"x"}]}\n', ["at least one message from the assistant"]),
        (b'{"messages":[{"role":"assistant","content":"x","weight":0}]}\n', ["nothing to learn"]),
        (b'{"messages":[{"role":"assistant","content":"x"}],"extra":1}\n', ["unknown key 'extra'"]),
        (b'{"a":1}\n', ["Unexpected file format"]),
        (b'{"messages":[{"role":"assistant","content":"x","weight":1.0}]}\n', ["'weight' that is not 0 or 1"]),
        (b'{"messages":[{"role":"assistant","content":"x","refusal":5}]}\n', ["'refusal' that is not a string"]),
        (
            b'{"messages":[{"role":"user","content":"x","refusal":"y"},{"role":"assistant","content":"x"}]}\n',
            ["'refusal', which only a message of role assistant may have"],
        ),
        (
            b'{"messages":[{"role":"assistant","content":"x"}],"tools":[{"type":"x","function":{"name":"f"}}]}\n',
            ["a tool must be"],
        ),
    ],
)
def test_every_fault_of_a_file_is_told_at_upload(client: OpenAI, rows: bytes, lines: list[str]) -> None:
    made = client.files.create(file=("bad.jsonl", rows), purpose="fine-tune")
    assert made.status == "error"
    assert made.status_details is not None
    assert [line for line in lines if line not in made.status_details] == []


def test_tool_calls_pass_and_unanswered_ones_do_not(client: OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    asks = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = [{"role": "tool", "tool_call_id": "c1", "content": "4"}, {"role": "assistant", "content": "4"}]
    good = json.dumps({"messages": asks + answer, "tools": tools, "parallel_tool_calls": False}).encode()
    bad = json.dumps({"messages": [*asks, {"role": "user", "content": "y"}, answer[1]], "tools": tools}).encode()
    assert client.files.create(file=("t.jsonl", good), purpose="fine-tune").status == "processed"
    old = {"role": "assistant", "content": None, "function_call": call["function"]}
    nothing = [asks[0], old, {"role": "function", "name": "f", "content": None}, answer[1]]
    row = json.dumps({"messages": nothing, "functions": [{"name": "f", "parameters": {}}]}).encode()
    assert client.files.create(file=("t.jsonl", row), purpose="fine-tune").status == "processed"
    found = client.files.create(file=("t.jsonl", bad), purpose="fine-tune")
    assert "c1 have no tool message" in str(found.status_details)


def test_an_upload_in_parts_becomes_a_file(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=len(CHAT), filename="t.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert (upload.object, upload.status, upload.file, upload.expires_at) == (
        "upload",
        "pending",
        None,
        upload.created_at + 3600,
    )
    parts = [client.uploads.parts.create(upload.id, data=data) for data in (CHAT[100:], CHAT[:100])]
    assert (parts[0].object, parts[0].upload_id) == ("upload.part", upload.id)
    ids = [parts[1].id, parts[0].id]
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=ids[:1])
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=ids, md5="0")
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(CHAT).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).read() == CHAT
    assert client.uploads.complete(upload.id, part_ids=ids) == done  # a retry whose answer was lost
    with pytest.raises(openai.BadRequestError):
        client.uploads.cancel(upload.id)


def test_an_upload_can_be_chunked_and_cancelled(client: OpenAI) -> None:
    done = client.uploads.upload_file_chunked(
        file=CHAT, filename="c.jsonl", bytes=len(CHAT), mime_type="text/jsonl", purpose="fine-tune", part_size=500
    )
    assert done.file is not None
    assert done.file.status == "processed"
    upload = client.uploads.create(bytes=3, filename="t", mime_type="text/plain", purpose="user_data")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"abc")


def test_a_job_runs_to_its_model(server: ApiServer, client: OpenAI, chat_file: str) -> None:
    made = client.fine_tuning.jobs.create(
        model="tiny-random", training_file=chat_file, validation_file=chat_file, suffix="my bot", seed=7,
        metadata={"team": "a b"}, hyperparameters={"n_epochs": 2, "batch_size": 4},
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
    )  # fmt: skip
    assert made.status == "validating_files"
    assert made.error is not None
    assert (made.object, made.finished_at, made.fine_tuned_model, made.result_files) == (
        "fine_tuning.job",
        None,
        None,
        [],
    )
    assert made.hyperparameters.learning_rate_multiplier == "auto"
    job = wait_until(client, made.id, *ENDS)
    assert job.status == "succeeded"
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.trained_tokens == 60
    assert (job.seed, job.metadata, job.estimated_finish) == (7, {"team": "a b"}, None)
    assert job.integrations is not None
    assert job.integrations[0].wandb.run_id == job.id  # type: ignore[attr-defined]
    assert str(job.fine_tuned_model).startswith("ft:tiny-random:personal:my-bot:")
    rows = client.files.content(job.result_files[0]).text.splitlines()
    assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [rows[1], rows[3]] == ["1,1.00000,,,", "3,0.33333,,0.66667,0.50000"]
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))[::-1]
    told = [event.message.partition(":")[0].partition(" at step")[0] for event in events]
    step = [
        "Step 1/6",
        "Step 2/6",
        "Step 3/6",
        "Checkpoint created",
        "Step 4/6",
        "Step 5/6",
        "Step 6/6",
        "Checkpoint created",
    ]
    begin = [
        "Created fine-tuning job",
        "Validating training file",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    end = ["New fine-tuned model created", "The job has successfully completed"]
    assert told == [*begin, *step, *end]
    assert len({event.id for event in events}) == len(events)
    third = next(event for event in events if event.message.startswith("Step 3/6"))
    assert third.message == "Step 3/6: training loss=0.33, validation loss=0.67, full validation loss=0.67"
    assert third.type == "metrics"
    assert third.data == {
        "step": 3, "train_loss": 1 / 3, "total_steps": 6, "valid_loss": 2 / 3, "full_valid_loss": 2 / 3,
        "valid_mean_token_accuracy": 0.5, "full_valid_mean_token_accuracy": 0.5,
    }  # fmt: skip
    kept = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [point.step_number for point in kept] == [6, 3]
    assert kept[1].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-3"
    for name in (str(job.fine_tuned_model), kept[1].fine_tuned_model_checkpoint):
        assert client.models.retrieve(name).id == name
    assert next(model.id for model in client.models.list()) == "tiny-random"
    with raw(server, client) as http:
        weights = http.get(f"/v1/fine_tuning/jobs/{job.id}/weights").json()["data"]
        assert http.get(f"/v1/fine_tuning/jobs/{job.id}/weights/{weights[0]['name']}").content == b"weights"
    again = client.fine_tuning.jobs.create(model=str(job.fine_tuned_model), training_file=chat_file)
    wait_until(client, again.id, *ENDS)  # what the stand-in exports is no model, and is refused as one
    config = json.loads((server.store / "jobs" / again.id / "config.yaml").read_text())
    assert config["model"]["name"] == str(server.store / "runs" / job.id / "exports" / "step-00000006")
    assert client.models.delete(str(job.fine_tuned_model)).deleted
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve(str(job.fine_tuned_model))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_dpo_job_has_its_own_settings(server: ApiServer, client: OpenAI) -> None:
    pairs = client.files.create(file=("p.jsonl", pair_rows(10)), purpose="fine-tune").id
    made = client.fine_tuning.jobs.create(
        model="tiny-random", training_file=pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    )
    job = wait_until(client, made.id, *ENDS)
    assert job.status == "succeeded"
    assert job.to_dict()["hyperparameters"] is None
    assert job.method is not None
    assert job.method.to_dict()["dpo"] == {
        "hyperparameters": {"beta": 0.2, "n_epochs": 10, "batch_size": 1, "learning_rate_multiplier": 1.0}
    }
    config = json.loads((server.store / "jobs" / job.id / "config.yaml").read_text())
    assert config["objective"] == {"kind": "dpo", "beta": 0.2}


@pytest.mark.parametrize(
    ("rows", "method", "code", "message"),
    [
        (
            chat_rows(7),
            "supervised",
            "invalid_n_examples",
            "Training file has 7 example(s), but must have at least 10 examples",
        ),
        (b"[1]\n", "supervised", "invalid_file_format", "Expected file to have JSONL format"),
        (
            b'{"messages":[{"content":"x"}]}\n',
            "supervised",
            "invalid_training_file",
            "Discriminator 'role' is missing in value",
        ),
        (CHAT, "dpo", "invalid_training_file", "is in the fine-tune-chat format, but"),
        (pair_rows(10), "supervised", "invalid_training_file", "provided method=supervised"),
    ],
)
def test_a_job_fails_in_validation_and_never_was_queued(
    client: OpenAI, rows: bytes, method: str, code: str, message: str
) -> None:
    file = client.files.create(file=("x.jsonl", rows), purpose="fine-tune").id
    made = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, method={"type": method})  # type: ignore[typeddict-item]
    job = wait_until(client, made.id, *ENDS)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("failed", None, None)
    assert job.finished_at is not None
    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, "training_file")
    assert message in job.error.message
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert (events[0].level, events[0].message) == ("error", job.error.message)
    assert not [event for event in events if "queued" in event.message]


def test_a_run_that_fails_fails_its_job(client: OpenAI, chat_file: str) -> None:
    made = client.fine_tuning.jobs.create(model="tiny-random", training_file=chat_file, seed=FAILS)
    job = wait_until(client, made.id, *ENDS)
    assert job.error is not None
    assert (job.status, job.error.code, job.error.message) == ("failed", "server_error", "the loss is not finite")


def test_a_job_is_paused_behind_a_checkpoint_resumed_and_another_cancelled(client: OpenAI, chat_file: str) -> None:
    settings = {"n_epochs": 2, "batch_size": 6}
    jobs = [
        client.fine_tuning.jobs.create(
            model="tiny-random", training_file=chat_file, seed=WAITS, hyperparameters=settings
        )  # type: ignore[arg-type]
        for _ in range(2)
    ]
    for job in jobs:
        wait_until(client, job.id, "running")
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(jobs[0].id)
    assert client.fine_tuning.jobs.pause(jobs[0].id).status in ("running", "paused")
    assert client.fine_tuning.jobs.cancel(jobs[1].id).status in ("running", "cancelled")
    wait_until(client, jobs[0].id, "paused")
    assert client.fine_tuning.jobs.resume(jobs[0].id).status == "queued"
    assert wait_until(client, jobs[0].id, *ENDS).status == "succeeded"
    gone = wait_until(client, jobs[1].id, *ENDS)
    assert (gone.status, gone.fine_tuned_model) == ("cancelled", None)
    events = [event.message for event in client.fine_tuning.jobs.list_events(jobs[0].id)]
    assert sorted(m for m in events if m.startswith("Step ")) == sorted({m for m in events if m.startswith("Step ")})
    for verb in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError):
            verb(jobs[1].id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": True}, "seed"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"method": {"type": "magic"}}, "method"),
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}] * 6}, "integrations"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"training_file": None}, "training_file"),
        ({"model": None}, "model"),
        ({"unheard": 1}, "unheard"),
        ({"dist_ft": {"run": {"name": "x"}}}, "dist_ft"),
        ({"dist_ft": {"method": {"init_from": "/etc"}}}, "dist_ft"),
        ({"dist_ft": {"optimizer": {"lr": -1}}}, "dist_ft"),
        *(({"dist_ft": empty}, "dist_ft") for empty in ("", 0, False, [])),
        *(
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": t}}]}, "integrations")
            for t in ("", 0)
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}, "x": 1}]}, "integrations"),
        ({"hyperparameters": {"learning_rate_multiplier": 10**400}}, "hyperparameters"),
    ],
)
def test_a_wrong_body_names_its_parameter(
    server: ApiServer, client: OpenAI, chat_file: str, body: dict[str, object], param: str
) -> None:
    with raw(server, client) as http:
        answer = http.post("/v1/fine_tuning/jobs", json={"model": "tiny-random", "training_file": chat_file, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_an_extension_reaches_the_run(server: ApiServer, client: OpenAI, chat_file: str) -> None:
    made = client.fine_tuning.jobs.create(
        model="tiny-random", training_file=chat_file, extra_body={"dist_ft": {"optimizer": {"lr": 0.5}}}
    )
    wait_until(client, made.id, *ENDS)
    assert json.loads((server.store / "jobs" / made.id / "config.yaml").read_text())["optimizer"]["lr"] == 0.5


def test_jobs_are_listed_in_pages_and_by_metadata(server: ApiServer) -> None:
    client = server.client("listing")
    file = client.files.create(file=("x.jsonl", chat_rows(1)), purpose="fine-tune").id
    pairs: list[dict[str, str] | None] = [{"a": "1"}, {"a": "1", "b": ""}, None, {"a": "2 3"}]
    ids = [client.fine_tuning.jobs.create(model="tiny-random", training_file=file, metadata=pair).id for pair in pairs]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"a": "1"})] == [ids[1], ids[0]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"a": "1", "b": ""})] == [ids[1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"a": "2 3"})] == [ids[3]]
    with raw(server, client) as http:
        assert [job["id"] for job in http.get("/v1/fine_tuning/jobs?metadata=null").json()["data"]] == [ids[2]]
        empty = http.get(f"/v1/fine_tuning/jobs/{ids[0]}/checkpoints").json()
        assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
        assert http.get("/v1/fine_tuning/jobs?limit=0").status_code == 400


def test_a_retry_makes_no_second_job_and_two_intended_jobs_stay_two(server: ApiServer) -> None:
    client = server.client("retries")
    file = client.files.create(file=("x.jsonl", chat_rows(1)), purpose="fine-tune").id
    body = {"model": "tiny-random", "training_file": file}

    def created(**headers: str) -> httpx.Response:
        with raw(server, client) as http:
            return http.post("/v1/fine_tuning/jobs", json=body, headers=headers)

    first = created().json()["id"]
    second = created().json()["id"]
    assert first != second
    assert created(**{"x-stainless-retry-count": "1"}).json()["id"] == second
    third = created(**{"idempotency-key": "k"}).json()["id"]
    assert created(**{"idempotency-key": "k"}).json()["id"] == third
    body["suffix"] = "other"
    assert created(**{"idempotency-key": "k"}).status_code == 400
    assert len(client.fine_tuning.jobs.list().data) == 3


def test_unknown_things_are_404_in_the_recorded_words(client: OpenAI) -> None:
    for call in (
        client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.list_events,
        client.fine_tuning.jobs.checkpoints.list,
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="Could not find fine tune: 123") as caught:
            call("123")
        assert (caught.value.code, caught.value.param) == ("fine_tune_not_found", "fine_tune_id")
    with pytest.raises(openai.NotFoundError, match="The model 'a/b' does not exist"):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError) as missing:
        client.get("/nowhere", cast_to=object)
    assert missing.value.message.endswith("Invalid URL (GET /v1/nowhere)")


def test_keys_are_needed_and_never_shown_whole(server: ApiServer, client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match=r"Incorrect API key provided: sk-ab\*\*\*yz") as caught:
        OpenAI(api_key="sk-abcdefghijklmnopyz", base_url=client.base_url).models.list()
    assert caught.value.code == "invalid_api_key"
    answer = httpx.get(f"{server.url}/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, None)
    assert answer.headers["x-request-id"].startswith("req_")
    with pytest.raises(openai.AuthenticationError):
        client.models.list(extra_headers={"OpenAI-Project": "other"})
    with pytest.raises(openai.AuthenticationError):
        client.models.list(extra_headers={"OpenAI-Organization": "org-other"})
    assert client.models.list(extra_headers={"OpenAI-Organization": "org-default"}).data


def test_inference_is_not_there_yet(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny-random", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code == 501


def test_a_foreign_project_sees_nothing(server: ApiServer, client: OpenAI, chat_file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny-random", training_file=chat_file).id
    name = str(wait_until(client, job, *ENDS).fine_tuned_model)
    upload = client.uploads.create(bytes=3, filename="t", mime_type="text/plain", purpose="user_data").id
    own, foreign = raw(server, client), raw(server, server.client("foreign", "member"))
    routes = [
        ("GET", f"/v1/files/{chat_file}"),
        ("GET", f"/v1/files/{chat_file}/content"),
        ("DELETE", f"/v1/files/{chat_file}"),
        *(
            ("GET", f"/v1/fine_tuning/jobs/{job}{end}")
            for end in ("", "/events", "/checkpoints", "/weights", "/weights/model.safetensors")
        ),
        *(("POST", f"/v1/fine_tuning/jobs/{job}/{verb}") for verb in ("cancel", "pause", "resume")),
        ("GET", f"/v1/models/{name}"),
        ("DELETE", f"/v1/models/{name}"),
        *(("POST", f"/v1/uploads/{upload}/{verb}") for verb in ("parts", "complete", "cancel")),
    ]
    with own, foreign:
        for method, path in routes:
            answer = foreign.request(method, path)
            assert answer.status_code == 404, path
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        body = {"model": "tiny-random", "training_file": chat_file}
        assert foreign.post("/v1/fine_tuning/jobs", json=body).status_code == 400
        assert foreign.post("/v1/fine_tuning/jobs", json={**body, "model": name}).status_code == 404
        for path in ("/v1/files", "/v1/fine_tuning/jobs"):
            assert foreign.get(path).json()["data"] == []
        assert own.get(f"/v1/files/{chat_file}").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "..\\..\\x.jsonl", "/etc/passwd", "a\x01b.jsonl", "..", ".", "x" * 2000]
)
def test_a_file_name_is_never_a_path(server: ApiServer, client: OpenAI, name: str) -> None:
    before = {path for path in server.store.parent.rglob("*") if server.store not in path.parents}
    made = client.files.create(file=(name, io.BytesIO(b"x")), purpose="user_data")
    assert not {"/", "\\", "\x01"} & set(made.filename)
    assert made.filename not in ("..", ".")
    assert client.files.content(made.id).read() == b"x"
    assert {path for path in server.store.parent.rglob("*") if server.store not in path.parents} == before


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"{", 400), ({}, b"[" * 100_000, 400), ({}, b"[]", 400), ({}, b'{"seed": NaN}', 400), ({}, b"\xff", 400),
        ({}, b'{"model": "\\ud800"}', 400), ({}, b" " * (2**20 + 1) + b"{}", 413),
        *(({}, b'{"model": "tiny-random", "training_file": "x", %s}' % member, 400) for member in (
            b'"suffix": "\\ud800"', b'"metadata": {"a": "\\udfff"}', b'"metadata": {"\\ud800": "a"}',
        )),
        ({"content-type": "text/plain"}, b'{"model": "tiny-random"}', 400),
        ({"content-type": "application/x-www-form-urlencoded"}, b"model=tiny-random", 400),
        ({"content-encoding": "gzip"}, b"\x1f\x8b", 415), ({"x-large": "x" * 70_000}, b"{}", 431),
    ],
)  # fmt: skip
def test_a_bad_body_is_answered_in_the_error_form(
    server: ApiServer, client: OpenAI, headers: dict[str, str], content: bytes, status: int
) -> None:
    with raw(server, client) as http:
        answer = http.post("/v1/fine_tuning/jobs", headers=headers, content=content)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nx"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="n"\r\n\r\n1\r\n' * 100 + b"--b--\r\n",
        ),
    ],
)
def test_a_broken_form_is_refused(server: ApiServer, client: OpenAI, kind: str, content: bytes) -> None:
    with raw(server, client) as http:
        answer = http.post("/v1/files", headers={"content-type": kind}, content=content)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/ft:tiny-random:personal::x:ckpt-step-²", 404),
        ("/v1/fine_tuning/jobs?limit=²", 400),
        ("/v1/fine_tuning/jobs?limit=" + "9" * 5000, 400),
        ("/v1/files?after=%00", 400),
        ("/v1/files?purpose=%00", 400),
    ],
)
def test_odd_digits_and_null_characters_are_no_fault_of_the_server(
    server: ApiServer, client: OpenAI, path: str, status: int
) -> None:
    with raw(server, client) as http:
        answer = http.get(path)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_step_of_a_known_model_in_odd_digits_is_404(server: ApiServer, client: OpenAI, chat_file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny-random", training_file=chat_file).id
    name = wait_until(client, job, *ENDS).fine_tuned_model
    with raw(server, client) as http:
        assert [http.get(f"/v1/models/{name}:ckpt-step-{step}").status_code for step in ("²", "9" * 5000)] == [404, 404]


@pytest.mark.parametrize("seconds", ["3599", "2592001", "²", "9" * 5000, "3600.5", ""])
def test_a_lifetime_out_of_range_is_refused(server: ApiServer, client: OpenAI, seconds: str) -> None:
    form = {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    with raw(server, client) as http:
        answer = http.post("/v1/files", files={"file": ("a", b"x")}, data=form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after"), answer.text


@pytest.mark.parametrize("expires", [{}, {"anchor": "created_at", "seconds": 3600, "x": 1}, {"anchor": "created_at"}])
def test_the_lifetime_of_an_upload_is_whole(server: ApiServer, client: OpenAI, expires: dict[str, object]) -> None:
    body = {"bytes": 3, "filename": "t", "mime_type": "text/plain", "purpose": "user_data", "expires_after": expires}
    with raw(server, client) as http:
        answer = http.post("/v1/uploads", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after"), answer.text


def test_a_fault_of_the_server_has_the_error_form(
    server: ApiServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.index, "counts", lambda _: 1 / 0)
    answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" not in answer.text and "x-request-id" in answer.headers


class _Mailbox(BaseHTTPRequestHandler):
    """Takes what a webhook brings; refuses the first try of each event of a job."""

    seen: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(({key.lower(): value for key, value in self.headers.items()}, body))
        self.send_response(503 if len(self.seen) == 1 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_a_webhook_brings_the_end_of_a_job_signed_and_again_if_it_was_refused(server: ApiServer) -> None:
    client = server.client("hooks")
    mailbox = HTTPServer(("127.0.0.1", 0), _Mailbox)
    thread = threading.Thread(target=mailbox.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{mailbox.server_port}/hook"
        made = client.webhooks.create(name="n", url=url, event_types=["fine_tuning.job.failed"])
        assert client.webhooks.event_types.list().data[0] == "fine_tuning.job.succeeded"
        assert [found.id for found in client.webhooks.list()] == [made.id]
        assert "signing_secret" not in client.webhooks.retrieve(made.id).to_dict()
        assert client.webhooks.update(made.id, name="m").name == "m"
        new = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        assert new.signing_secret != made.signing_secret
        file = client.files.create(file=("x.jsonl", chat_rows(1)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file).id
        wait_for(lambda: len(_Mailbox.seen) == 2)
        (first, _), (headers, body) = _Mailbox.seen
        assert first["webhook-id"] == headers["webhook-id"]
        for secret in (made.signing_secret, new.signing_secret):
            event = client.webhooks.unwrap(body, headers, secret=secret)
            assert (event.type, event.data.id) == ("fine_tuning.job.failed", job)  # type: ignore[union-attr]
        tried = client.webhooks.test(made.id, event_type="fine_tuning.job.succeeded")
        assert (tried.status_code, tried.success, tried.webhook_endpoint_id) == (200, True, made.id)
        assert client.webhooks.delete(made.id).object == "webhook_endpoint.deleted"
        with pytest.raises(openai.NotFoundError):
            client.webhooks.retrieve(made.id)
    finally:
        mailbox.shutdown()
        thread.join()
        mailbox.server_close()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://10.0.0.1/",
        "https://169.254.169.254/x",
        "https://[fd00::1]/",
        "ftp://a",
        "https://u:p@a.b/",
        "x",
    ],
)
def test_an_endpoint_must_be_public(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(name="n", url=url, event_types=["fine_tuning.job.failed"])
    assert caught.value.param == "url"


def test_health_and_metrics_need_no_key(server: ApiServer) -> None:
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert "dist_ft_http_requests_total" in httpx.get(f"{server.url}/metrics").text


def test_a_deleted_index_is_made_anew_from_the_store(tmp_path: Path) -> None:
    with api_server(tmp_path) as first:
        client = first.client()
        file = client.files.create(file=("c.jsonl", CHAT), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file)
        before = wait_until(client, job.id, *ENDS)
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    with api_server(tmp_path) as second:
        client = second.client()
        assert client.fine_tuning.jobs.retrieve(job.id) == before
        assert client.fine_tuning.jobs.list_events(job.id, limit=100).data == events
        assert client.files.content(file).read() == CHAT
        assert len(client.fine_tuning.jobs.checkpoints.list(job.id).data) == 9
        assert client.models.retrieve(str(before.fine_tuned_model)).owned_by == "org-default"


def test_jobs_queue_beyond_the_limit_and_survive_a_restart(tmp_path: Path) -> None:
    with api_server(tmp_path, max_running=1) as first:
        client = first.client()
        file = client.files.create(file=("c.jsonl", CHAT), purpose="fine-tune").id
        made = [
            client.fine_tuning.jobs.create(
                model="tiny-random", training_file=file, seed=WAITS, hyperparameters={"n_epochs": 2}
            ).id
            for _ in range(2)
        ]
        wait_until(client, made[0], "running")
        assert wait_until(client, made[1], "queued").status == "queued"
    with api_server(tmp_path, max_running=1) as second:
        client = second.client()
        assert [client.fine_tuning.jobs.retrieve(job).status for job in made] == ["running", "queued"]
        assert client.fine_tuning.jobs.cancel(made[1]).status == "cancelled"
        client.fine_tuning.jobs.cancel(made[0])
        assert wait_until(client, made[0], *ENDS).status == "cancelled"
        started = [e for e in client.fine_tuning.jobs.list_events(made[0]) if e.message == "Fine-tuning job started"]
        assert len(started) == 1

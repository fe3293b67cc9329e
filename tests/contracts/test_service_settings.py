"""What whoever runs the service sets: quotas, prices and speeds, a key from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner

from dist_ft.cli.app import app
from dist_ft.errors import ConfigError, UsageError
from dist_ft.service.api_keys import caller_with, keep_key_of, list_keys
from dist_ft.service.api_server import Settings, open_index
from dist_ft.service.http.request_quota import RequestQuota
from dist_ft.service.index import Index
from dist_ft.service.tuning.catalogue import read_catalogue
from dist_ft.service.wire import ApiError
from tests.helpers.api_server import ENDS, api_server, chat_rows, wait_until

KEY = "k" * 40


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = open_index(Settings(tmp_path / "store"))
    yield opened
    opened.close()


def catalogue(folder: Path, **numbers: object) -> Path:
    entry = {"name": "own", "model": "tiny-random", "context": 128, "learning_rate": 0.001, **numbers}
    path = folder / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": [entry]}))
    return path


def test_time_and_price_are_told_before_the_start_and_stay_in_the_job(tmp_path: Path) -> None:
    priced = catalogue(tmp_path, tokens_per_s=20, price_per_million_tokens=3)
    with api_server(tmp_path / "store", catalogue=priced) as server:
        client = server.client()
        rows = chat_rows(40)
        file = client.files.create(file=("chat.jsonl", rows), purpose="fine-tune")
        body: dict[str, object] = {"model": "own", "training_file": file.id}
        asked = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=httpx.Response).json()
        assert not client.fine_tuning.jobs.list().data, "an estimate makes no job"
        job = wait_until(client, client.fine_tuning.jobs.create(model="own", training_file=file.id).id, *ENDS)
        assert job.model_extra is not None
        told = job.model_extra["dist_ft"]["estimate"]
        assert asked == {"object": "dist_ft.estimate", **told}
        epochs, batch = job.hyperparameters.n_epochs, job.hyperparameters.batch_size  # type: ignore[union-attr]
        assert (epochs, batch, told["steps"]) == (3, 1, 120)
        characters = 40 * len("userHow many?assistantFour.")
        assert told["tokens"] == characters // 4 * 3
        assert (told["seconds"], told["price"]) == (told["tokens"] / 20, pytest.approx(told["tokens"] * 3e-6))
        shown = client.models.retrieve("own").model_extra
        assert shown is not None
        assert (shown["dist_ft"]["tokens_per_s"], shown["dist_ft"]["price_per_million_tokens"]) == (20, 3)
        body["training_file"] = client.files.create(file=("x.txt", b"x"), purpose="user_data").id
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/fine_tuning/jobs/estimate", body=body, cast_to=httpx.Response)
        assert caught.value.param == "training_file"


@pytest.mark.parametrize("value", [0, -1, "fast", True])
def test_a_speed_that_is_no_positive_number_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"entry 1: tokens_per_s=.*expected a number above 0"):
        read_catalogue(catalogue(tmp_path, tokens_per_s=value))


def test_the_best_checkpoint_is_named_and_can_be_trained_again(tmp_path: Path) -> None:
    with api_server(tmp_path / "store") as server:
        client = server.client()
        file = client.files.create(file=("chat.jsonl", chat_rows(12)), purpose="fine-tune").id
        made = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, validation_file=file)
        job = wait_until(client, made.id, *ENDS)
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        least = min(checkpoints, key=lambda checkpoint: float(checkpoint.metrics.full_valid_loss or 0))
        assert job.model_extra is not None
        assert job.model_extra["dist_ft"]["best_checkpoint"] == least.fine_tuned_model_checkpoint
        config = yaml.safe_load((server.store / "runs" / job.id / "config.yaml").read_text())
        assert config["eval"]["best_metric"] == "eval_loss"
        again = client.fine_tuning.jobs.create(model=least.fine_tuned_model_checkpoint, training_file=file)
        assert again.model == least.fine_tuned_model_checkpoint
        plain = wait_until(client, client.fine_tuning.jobs.create(model="tiny-random", training_file=file).id, *ENDS)
        assert plain.model_extra is not None
        assert plain.model_extra["dist_ft"]["best_checkpoint"] is None, "without held-out examples there is no best"


def test_a_project_that_asks_too_often_is_told_when_to_come_back_and_others_are_served(tmp_path: Path) -> None:
    with api_server(tmp_path / "store", max_requests=3) as server:
        eager, other = server.client("eager"), server.client("other")
        for left in ("2", "1", "0"):
            answer = eager.models.with_raw_response.list()
            headers = [answer.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining")]
            assert headers == ["3", left]
        with pytest.raises(openai.RateLimitError, match="limit 3 a minute") as caught:
            eager.models.list()
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20
        assert other.models.list().data
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_quota_refills_evenly() -> None:
    clock = [100.0]
    quota = RequestQuota(60, now=lambda: clock[0])
    for left in range(59, -1, -1):
        taken = quota.take("p")
        assert taken is not None and taken.remaining == left
    with pytest.raises(ApiError, match=r"Try again in 1\.0 s"):
        quota.take("p")
    clock[0] += 1
    assert quota.take("p") is not None
    with pytest.raises(ApiError):
        quota.take("p")
    clock[0] += 3600
    taken = quota.take("p")
    assert taken is not None and taken.remaining == 59, "a long rest does not save up more"


def test_a_key_in_a_file_is_an_administrators_and_goes_when_the_file_changes(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    keep_key_of(index, path)
    keep_key_of(index, path)
    caller = caller_with(index, KEY)
    assert caller is not None and (caller.role, caller.project) == ("admin", "default")
    [info] = list_keys(index)
    assert KEY not in str(info)
    path.write_text("n" * 40)
    keep_key_of(index, path)
    assert caller_with(index, KEY) is None
    assert caller_with(index, "n" * 40) is not None


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "found 0 characters"), (b"short", "found 5 characters"), (b"\xff" * 40, "utf-8")]
)
def test_a_file_without_a_key_is_refused(index: Index, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        keep_key_of(index, tmp_path / "key")
    assert str(tmp_path / "key") in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        keep_key_of(index, tmp_path / "none")
    assert list_keys(index) == []


def test_the_url_of_the_index_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_FT_DATABASE", f"sqlite:///{tmp_path / 'elsewhere.sqlite'}")
    made = CliRunner().invoke(app, ["api", "key", "add", "--store", str(tmp_path / "store"), "--role", "admin"])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "elsewhere.sqlite").exists()
    assert not (tmp_path / "store" / "index.sqlite").exists()

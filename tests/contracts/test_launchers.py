"""What every launcher promises, run on each of them: the local machine for real, the others before doubles."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_ft.errors import DistFtError, UsageError, UserError
from dist_ft.launchers.launcher import Job, SubmitRequest
from tests.helpers.launchers import WORDS, KubernetesPlace, LocalPlace, RayPlace, SlurmPlace
from tests.k8s import overlays

AnyPlace = LocalPlace | RayPlace | SlurmPlace | KubernetesPlace


@pytest.fixture(params=["local", "ray", "slurm", "kubernetes"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyPlace]:
    if request.param == "kubernetes" and not overlays.is_kubectl_there():
        pytest.skip(overlays.WHY_ABSENT)
    made: AnyPlace = {
        "local": lambda: LocalPlace(tmp_path),
        "ray": lambda: RayPlace(monkeypatch),
        "slurm": lambda: SlurmPlace(tmp_path, monkeypatch),
        "kubernetes": lambda: KubernetesPlace(tmp_path, monkeypatch),
    }[request.param]()
    yield made
    made.close()


@pytest.fixture
def request_(place: AnyPlace, tmp_path: Path) -> SubmitRequest:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: 'embedded:orders/train'}]}\n")
    # Pods have a volume of their own.
    where = () if isinstance(place, KubernetesPlace) else (f"run.output_dir={tmp_path}/runs",)
    return SubmitRequest(path, where, preflight=False)


def wait_until(place: AnyPlace, job: str, is_over: bool) -> Job:
    deadline = time.monotonic() + 60
    while (found := place.launcher.status(job)).is_over != is_over:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def wait_for_words(place: AnyPlace, job: str) -> str:
    deadline = time.monotonic() + 60
    while WORDS not in (text := place.launcher.logs(job)):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    return text


def test_a_run_that_was_taken_is_at_work_under_its_name(place: AnyPlace, request_: SubmitRequest) -> None:
    submitted = place.launcher.submit(request_)
    found = place.launcher.status(submitted.job)
    assert (found.submission_id, found.is_over, found.exit_code) == (submitted.job, False, None)
    assert submitted.run_dir.endswith("runs/mine")
    assert found.run_dir == submitted.run_dir
    wait_for_words(place, submitted.job)
    assert place.num_started == 1


def test_what_is_known_of_a_job_is_json(place: AnyPlace, request_: SubmitRequest) -> None:
    found = place.launcher.status(place.launcher.submit(request_).job)
    assert Job(**json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_at_work_is_not_started_twice(place: AnyPlace, request_: SubmitRequest, resume: bool) -> None:
    job = place.launcher.submit(request_).job
    wait_for_words(place, job)
    with pytest.raises(UsageError, match=job.rpartition("/")[2]):
        place.launcher.submit(replace(request_, resume=resume))
    assert place.num_started == 1


def test_a_run_that_has_ended_is_submitted_again_under_another_name(
    place: AnyPlace, request_: SubmitRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place.launcher.submit(request_).job
    wait_for_words(place, first)
    place.end(1)
    wait_until(place, first, is_over=True)
    later = time.gmtime(time.time() + 1)  # Ray's names hold the second
    monkeypatch.setattr("dist_ft.launchers.ray.jobs.time.gmtime", lambda: later)
    second = place.launcher.submit(replace(request_, resume=True)).job
    assert second != first
    assert place.launcher.status(first).is_over


def test_a_config_that_breaks_a_rule_starts_nothing(place: AnyPlace, request_: SubmitRequest) -> None:
    with pytest.raises(UserError, match="unknown key"):
        place.launcher.submit(replace(request_, overrides=(*request_.overrides, "optimizer.lrr=1")))
    assert place.num_started == 0


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_who_follows_sees_the_output_and_gets_the_exit_code(
    place: AnyPlace, request_: SubmitRequest, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job = place.launcher.submit(request_).job
    wait_for_words(place, job)
    place.end_after_output(code)
    ended = place.launcher.follow(job)
    assert ended is not None
    assert ended.exit_code == code
    printed = capsys.readouterr().out
    assert printed.count(WORDS) == 1
    assert '{"run_dir"' not in printed, "the result is for who follows, not for the screen"
    found = place.launcher.status(job)
    assert (found.is_over, found.exit_code) == (True, code)


def test_a_stop_waits_for_the_checkpoint_and_says_how_it_ended(place: AnyPlace, request_: SubmitRequest) -> None:
    job = place.launcher.submit(request_).job
    wait_for_words(place, job)
    line = place.launcher.stop(job, 30)
    assert "stopped" in line or "exit code 3" in line
    found = wait_until(place, job, is_over=True)
    assert found.exit_code in (3, None), "Ray keeps no exit code of a job that it stopped"


def test_a_stop_that_is_not_followed_in_time_is_a_failure(place: AnyPlace, request_: SubmitRequest) -> None:
    place.be_deaf()
    job = place.launcher.submit(request_).job
    wait_for_words(place, job)
    with pytest.raises(DistFtError) as caught:
        place.launcher.stop(job, 0)
    assert caught.value.exit_code == 1
    assert not place.launcher.status(job).is_over


def test_what_has_ended_is_not_stopped(place: AnyPlace, request_: SubmitRequest) -> None:
    job = place.launcher.submit(request_).job
    wait_for_words(place, job)
    place.end(0)
    wait_until(place, job, is_over=True)
    with pytest.raises(UsageError, match="there is nothing to stop"):
        place.launcher.stop(job, 1)


@pytest.mark.parametrize("verb", ["status", "logs", "follow", "stop"])
def test_a_job_that_was_never_there_is_an_error_of_the_user(place: AnyPlace, verb: str) -> None:
    arguments = (place.unknown, 1.0) if verb == "stop" else (place.unknown,)
    with pytest.raises(UsageError) as caught:
        getattr(place.launcher, verb)(*arguments)
    assert place.unknown in str(caught.value)

"""Models of a hub that listens on loopback: fetched once, held at a commit, refused in one line."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dist_ft.config import Config, dump_yaml, load_config
from dist_ft.errors import DistFtError, HubUnreachableError, ModelError
from dist_ft.model import hub as hub_door
from dist_ft.model.base import at_commit, model_dir
from dist_ft.model.embedded import materialise
from dist_ft.orchestrate.driver.previous import with_recorded_commit
from dist_ft.run.place import open_run
from tests.helpers.configs import tiny_config
from tests.helpers.hub import MODEL, Hub, files_of, serve
from tests.helpers.runs import Run

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "tokenizer.json": b"[]"}
OTHERS = {
    "README.md": b"-", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again", "modeling.py": b"code",
    "original/params.json": b"{}", "onnx/model.safetensors": b"-",
}  # fmt: skip
FETCH = """
import sys
from dist_ft.config import load_config
from dist_ft.model import hub
from dist_ft.run.place import open_run
from dist_ft.run.place import open_run
print(hub.fetch(load_config(__import__("pathlib").Path(sys.argv[1]))))
"""


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does in a fresh process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub()) as found:
        found.commit({**FILES, **OTHERS})
        point_at(found.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


def make_config(tmp_path: Path, **changes: Any) -> Config:
    return tiny_config(tmp_path, **{"model__name": MODEL, **changes})


def problem(config: Config, expected: type[DistFtError] = ModelError) -> str:
    """The one line that a fetch ends with."""
    with pytest.raises(expected) as caught:
        hub_door.fetch(config)
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_what_is_loaded_is_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    found = model_dir(config)
    assert files_of(found) == FILES
    assert not [path for path in found.iterdir() if path.is_dir()]
    assert model_dir(config) == found
    assert hub.sent == dict.fromkeys(FILES, 1)


def test_code_is_fetched_when_it_may_run(hub: Hub, tmp_path: Path) -> None:
    hub_door.fetch(make_config(tmp_path))
    assert "modeling.py" in files_of(hub_door.fetch(make_config(tmp_path, model__trust_remote_code=True)))


def test_two_processes_at_once_fetch_once(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(make_config(tmp_path)))
    hub.commit({**FILES, "model.safetensors": os.urandom(20_000_000)})
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FETCH, str(path)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(found) == 1
    assert hub.sent == dict.fromkeys(FILES, 1)


def test_a_fetch_that_breaks_off_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.commit({**FILES, "model.safetensors": os.urandom(3_000_000)})
    hub.breaks_off = {"model.safetensors"}
    assert (
        files_of(hub_door.fetch(make_config(tmp_path)))["model.safetensors"]
        == [*hub.commits.values()][-1]["model.safetensors"]
    )


def test_a_run_keeps_its_commit_when_the_branch_moves(hub: Hub, tmp_path: Path) -> None:
    first = hub.branches["main"]
    config = make_config(tmp_path)
    begun = at_commit(config)
    assert begun.model.commit == first
    run_dir = open_run(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.config.write_text(dump_yaml(begun))
    hub.commit({**FILES, "model.safetensors": b"moved"})
    resumed = with_recorded_commit(config, run_dir)
    assert resumed == begun == at_commit(resumed)
    assert files_of(model_dir(resumed)) == FILES
    assert at_commit(config).model.commit != first


def test_another_revision_than_the_runs_is_resolved_anew(hub: Hub, tmp_path: Path) -> None:
    run_dir = open_run(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.config.write_text(dump_yaml(at_commit(make_config(tmp_path))))
    other = hub.commit({**FILES, "model.safetensors": b"other"}, branch="v2")
    config = with_recorded_commit(make_config(tmp_path, model__revision="v2"), run_dir)
    assert at_commit(config).model.commit == other


def test_a_local_model_has_no_commit(tmp_path: Path) -> None:
    for name in ("tiny-random", str(materialise("tiny-random"))):
        config = tiny_config(tmp_path, model__name=name)
        assert at_commit(config) == config


def test_a_gated_model_names_its_page_and_the_variable(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    text = problem(make_config(tmp_path))
    assert f"{hub.url}/{MODEL}" in text
    assert "HF_TOKEN is not set" in text
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    text = problem(make_config(tmp_path))
    assert "HF_TOKEN is set, but has no access" in text
    assert "hf_another" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert files_of(hub_door.fetch(make_config(tmp_path))) == FILES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__name": "someone/other"}, ["someone/other", "neither a directory", "HF_TOKEN"]),
        ({"model__name": "a/b/c"}, ["a/b/c", "owner/name"]),
        ({"model__revision": "v9"}, ["model.revision=v9", MODEL]),
        ({"model__commit": "0" * 40}, ["model.commit=000", MODEL]),
    ],
    ids=str,
)
def test_what_the_hub_does_not_have_is_named(
    hub: Hub, tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    text = problem(make_config(tmp_path, **changes))
    assert all(word in text for word in said), text


def test_a_private_model_reads_as_one_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.token, hub.is_private = "hf_secret", True
    assert "set HF_TOKEN for a private one" in problem(make_config(tmp_path))


def test_a_refused_token_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.status = 403
    assert "check the token in HF_TOKEN" in problem(make_config(tmp_path))


def test_offline_names_the_cache_and_the_variable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = problem(make_config(tmp_path))
    assert str(tmp_path / "cache") in text
    assert "HF_HUB_OFFLINE" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = hub_door.fetch(make_config(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_door.fetch(make_config(tmp_path)) == found


def test_a_hub_that_is_down_is_the_users_at_the_start_and_passes_later(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.branches["main"]
    point_at("http://someone:hf_secret@127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for config, expected in (
        (make_config(tmp_path), ModelError),
        (make_config(tmp_path, model__commit=commit), HubUnreachableError),
    ):
        text = problem(config, expected)
        assert "http://127.0.0.1:9" in text
        assert "secret" not in text
        assert str(tmp_path / "cache") in text


@pytest.mark.parametrize("commit", [None, "0" * 40])
def test_a_hub_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_door, "_ANSWER_LIMIT_S", 0.1)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        point_at(f"http://127.0.0.1:{mute.getsockname()[1]}", monkeypatch)
        began = time.monotonic()
        problem(make_config(tmp_path, model__commit=commit), HubUnreachableError if commit else ModelError)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "is not writable")], ids=str
)
def test_a_cache_that_takes_nothing_is_named(tmp_path: Path, number: int, said: str) -> None:
    text = str(hub_door.explain(OSError(number, os.strerror(number)), make_config(tmp_path), ModelError))
    assert said in text
    assert constants.HF_HUB_CACHE in text
    assert "HF_HOME" in text


def test_a_model_of_pickles_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.commit({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        model_dir(make_config(tmp_path))
    assert "pytorch_model.bin" not in hub.sent


def test_a_run_that_is_gone_on_with_stays_at_its_commit_and_says_so(tmp_path: Path, cli: str) -> None:
    files = files_of(materialise("tiny-random"))
    with serve(Hub(token="hf_loopback")) as found:
        first = found.commit(files)
        env = {"HF_ENDPOINT": found.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_loopback"}
        settings = (f"model.name={MODEL}", "method={kind: lora, r: 4}")
        began = Run(cli, tmp_path, "null", "t", *settings, "train.max_steps=1", env=env)
        assert began.finish()[0] == 0
        found.commit({**files, "model.safetensors": files["model.safetensors"][:-4] + b"move"})
        resumed = Run(cli, tmp_path, "null", "t", *settings, "train.max_steps=2", "--resume", env=env)
        assert resumed.finish()[0] == 0
        assert found.sent["model.safetensors"] == 1
    export = resumed.dir.exports / "final"
    assert json.loads((export / "adapter_config.json").read_text())["revision"] == first
    assert first in (export / "README.md").read_text()
    assert load_config(resumed.dir.config).model.commit == first
    (change,) = resumed.events("settings_changed")
    assert change["changes"] == ["train.max_steps: 1 → 2"]
    assert not [path for path in resumed.dir.path.rglob("*") if path.is_file() and b"hf_loop" in path.read_bytes()]

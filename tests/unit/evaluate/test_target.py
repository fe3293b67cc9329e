"""What `dist-ft eval` takes a path for, on directories made here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.config import Config, dump_yaml, with_commit
from dist_ft.errors import UsageError
from dist_ft.evaluate.target import find_target
from dist_ft.layout import RunDir
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest


def _config(model: str, held_out: Any = 0.1) -> Config:
    data = {"train": [{"source": "embedded:orders/train"}], "eval": held_out}
    return Config.model_validate({"run": {"name": "r"}, "model": {"name": model}, "data": data})


GIVEN = _config("given")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    write_json(run_dir.run_json, asdict(RunRecord("run", state="completed", step=40)))
    run_dir.config.write_text(dump_yaml(_config("of the run")), encoding="utf-8")
    store = LocalStore(run_dir.path)
    take_attempt(store, None)
    for step in (30, 40):
        manifest = make_manifest(step)
        store.create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())
    return run_dir


def _export(run: RunDir, step: int, *links: str) -> str:
    run.export(step).mkdir(parents=True)
    for link in links:
        (run.exports / link).symlink_to(run.export(step).name)
    return str(run.export(step))


def test_a_run_without_exports_is_measured_by_its_last_checkpoint_or_the_one_asked_for(run: RunDir) -> None:
    for step, wanted in ((None, 40), (30, 30)):
        target = find_target(str(run.path), GIVEN, step)
        assert target.models == {"base": None}
        assert target.checkpoint == f"checkpoints/step-{wanted:08d}-a0001/manifest.json"
    assert target.config.model.name == "of the run"
    assert target.config.data == GIVEN.data


def test_exports_of_a_run_are_used(run: RunDir) -> None:
    final = _export(run, 40, "final")
    assert find_target(str(run.path), GIVEN, None).models == {"base": None, "tuned": final}
    best = _export(run, 30, "best")
    assert find_target(str(run.path), GIVEN, None).models == {"base": None, "tuned": final, "best": best}
    target = find_target(str(run.path), GIVEN, 30)
    assert (target.models, target.checkpoint) == ({"base": None, "tuned": best}, None)


def test_the_best_is_not_measured_twice(run: RunDir) -> None:
    final = _export(run, 40, "final", "best")
    assert find_target(str(run.path), GIVEN, None).models == {"base": None, "tuned": final}


def test_an_adapter_stands_on_the_model_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    target = find_target(str(tmp_path), GIVEN, None)
    assert target.models == {"base": None, "tuned": str(tmp_path)}
    assert target.config == GIVEN


def test_a_model_is_measured_alone_with_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    target = find_target(str(tmp_path), with_commit(GIVEN, "c0ffee"), None)
    assert target.models == {"model": None}
    model = target.config.model
    assert (model.name, model.revision, model.commit) == (str(tmp_path), None, None)


@pytest.mark.parametrize(
    ("config", "step", "problem"),
    [
        (_config("given", held_out=None), None, "set data.eval"),
        (GIVEN, None, "neither a run"),
        (GIVEN, 5, "--step 5 is for runs"),
    ],
)
def test_what_cannot_be_measured_is_said(config: Config, step: int | None, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        find_target(str(tmp_path), config, step)
    with pytest.raises(UsageError):
        find_target(str(tmp_path / "nowhere"), config, step)


def test_a_step_that_was_never_kept_is_said(run: RunDir) -> None:
    with pytest.raises(UsageError, match="no checkpoint at step 35"):
        find_target(str(run.path), GIVEN, 35)

"""What a run, a directory and a service's store are served as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_ft.config.load import dump_yaml
from dist_ft.errors import UsageError
from dist_ft.layout import FORMAT_VERSION
from dist_ft.run.state import RunRecord
from dist_ft.service.api_keys import ANYBODY
from dist_ft.service.wire import ApiError
from dist_ft.serving.ray_app import Source, names_of
from dist_ft.serving.served_models import DirectoryNames, Exports, RunNames
from tests.helpers.configs import tiny_config
from tests.helpers.served import make_adapter, make_base


def no_starter() -> str:
    raise AssertionError("nothing is exported here")


def make_run(tmp_path: Path, export: Path, **changes: object) -> Path:
    """Writes a finished run around an export."""
    run = tmp_path / "runs" / "t"
    exports = run / "exports"
    exports.mkdir(parents=True)
    shutil.copytree(export, exports / "step-00000006")
    (exports / "final").symlink_to("step-00000006")
    (run / "config.yaml").write_text(dump_yaml(tiny_config(tmp_path, **changes)))
    record = {"format_version": FORMAT_VERSION, **RunRecord("t", state="completed").to_dict()}
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_a_run_with_an_adapter_serves_it_and_its_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path, make_adapter(base, tmp_path / "adapter", 1), model__name=str(base), method__kind="lora")
    names = RunNames(str(run), Exports(tmp_path, no_starter))
    assert [model["id"] for model in names.listed(ANYBODY)] == ["t", "base"]
    tuned, plain = names.find("t", ANYBODY), names.find("base", ANYBODY)
    assert tuned.spec == plain.spec, "they share an engine"
    assert plain.adapter is None and tuned.adapter == str(run / "exports" / "step-00000006")
    for other in ("u", "t:ckpt-step-99", "t:ckpt-step-x"):
        with pytest.raises(ApiError) as caught:
            names.find(other, ANYBODY)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_an_adapter_that_cannot_be_mixed_gets_an_engine_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    dora = make_adapter(base, tmp_path / "dora", 1, use_dora=True)
    names = RunNames(
        str(make_run(tmp_path, dora, model__name=str(base), method__kind="lora")), Exports(tmp_path, no_starter)
    )
    tuned, plain = names.find("t", ANYBODY), names.find("base", ANYBODY)
    assert tuned.adapter is None and tuned.spec.merged and plain.spec.merged is None


def test_a_run_of_the_whole_model_serves_its_export(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_base(tmp_path / "base"))
    names = RunNames(str(run), Exports(tmp_path, no_starter))
    assert [model["id"] for model in names.listed(ANYBODY)] == ["t"]
    assert names.find("t", ANYBODY).spec.config["model"]["name"] == str(run / "exports" / "step-00000006")


def test_a_directory_is_a_model_or_an_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "tuned", 1)
    assert [model["id"] for model in DirectoryNames(base).listed(ANYBODY)] == ["base"]
    assert [model["id"] for model in DirectoryNames(adapter).listed(ANYBODY)] == ["tuned", "base"]
    assert DirectoryNames(adapter).find("base", ANYBODY).spec == DirectoryNames(base).find("base", ANYBODY).spec
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(UsageError, match="names no base model"):
        DirectoryNames(adapter)


def test_a_store_serves_its_catalogue_before_anything_is_tuned(tmp_path: Path) -> None:
    names, index = names_of(Source(store=tmp_path), tmp_path)
    assert [model["id"] for model in names.listed(ANYBODY)] == ["tiny-random", "smollm2-135m-instruct"]
    assert names.find("tiny-random", ANYBODY).spec.config["data"]["chat_template"] == "chatml"
    with pytest.raises(ApiError):
        names.find("ft:tiny-random:personal::x", ANYBODY)
    index.close()

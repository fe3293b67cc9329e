"""What paths and URLs of a config mean to pods, with a shared volume and without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_ft.config import Config, load_config
from dist_ft.errors import ConfigError
from dist_ft.launchers.kubernetes.pod_paths import on_volume

MOUNT = "/mnt/dist-ft"
IN_A_STORE = ("run.output_dir=s3://b/runs/", "data.train=[{source: 's3://b/a.jsonl'}]")


def _config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "My_Run.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: chats.jsonl}]}\n")
    return load_config(path, overrides)


def test_relative_paths_are_below_the_volume_and_names_stay(tmp_path: Path) -> None:
    config = on_volume(_config(tmp_path, "data.eval=0.1", "method.init_from=adapters/a"), MOUNT)
    assert config.run.output_dir == "/mnt/dist-ft/runs"
    assert config.data.train[0].source == "/mnt/dist-ft/chats.jsonl"
    assert config.method.init_from == "/mnt/dist-ft/adapters/a"
    assert (config.model.name, config.data.eval) == ("tiny-random", 0.1)


@pytest.mark.parametrize(("written", "means"), [("org/model", "org/model"), ("./m", f"{MOUNT}/m"), ("/m", "/m")])
def test_a_model_is_a_hub_name_unless_it_begins_like_a_path(tmp_path: Path, written: str, means: str) -> None:
    assert on_volume(_config(tmp_path, f"model.name={written}"), MOUNT).model.name == means


@pytest.mark.parametrize("output_dir", ["/home/me/runs", "../runs", "~/runs", "/mnt/dist-ft-other/runs"])
def test_a_run_directory_off_the_volume_is_refused(tmp_path: Path, output_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.output_dir"):
        on_volume(_config(tmp_path, f"run.output_dir={output_dir}"), MOUNT)


def test_a_home_is_refused_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.0\.source=~/a\.jsonl"):
        on_volume(_config(tmp_path, "data.train=[{source: ~/a.jsonl}]"), MOUNT)


def test_a_url_of_what_is_only_read_from_paths_is_refused_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.init_from=s3://b/a: this is not read from a URL"):
        on_volume(_config(tmp_path, "method.init_from=s3://b/a"), MOUNT)


def test_data_behind_a_url_is_read_from_there(tmp_path: Path) -> None:
    assert on_volume(_config(tmp_path, "data.eval=s3://b/e.jsonl"), MOUNT).data.eval == "s3://b/e.jsonl"


@pytest.mark.parametrize(
    ("written", "means"),
    [("cache", f"{MOUNT}/cache"), ("/mnt/dist-ft/c", "/mnt/dist-ft/c"), ("gs://b/c/", "gs://b/c"), ("null", None)],
)
def test_token_shards_are_on_the_volume_or_at_a_url_and_their_copies_where_the_pod_has_them(
    tmp_path: Path, written: str, means: str | None
) -> None:
    overrides = [f"data.cache_dir={written}", f"data.loader.replicas=[{written}]", "data.loader.cache_dir=here"]
    data = on_volume(_config(tmp_path, *overrides[: None if means else 1], overrides[2]), MOUNT).data
    assert (data.cache_dir, data.loader.cache_dir) == (means, "here")
    assert data.loader.replicas == ([means] if means else [])


@pytest.mark.parametrize("key", ["run.output_dir", "data.cache_dir"])
@pytest.mark.parametrize("mount", [MOUNT, None])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://host/runs", "without exclusive creation"),
        ("s3://u:Zq9@b/runs", "user info"),
        ("s3:///runs", "no bucket"),
        ("s3://b/../c", "literally"),
        ("file:///runs", "without exclusive creation"),
    ],
)
def test_a_url_of_no_object_store_is_refused_with_its_key(
    tmp_path: Path, key: str, mount: str | None, url: str, words: str
) -> None:
    config = _config(tmp_path, *IN_A_STORE)
    section, name = key.split(".")
    changed = getattr(config, section).model_copy(update={name: url})
    # Not as an override: what reads the file refuses a password before.
    with pytest.raises(ConfigError, match=rf"{key}: .*{words}") as caught:
        on_volume(config.model_copy(update={section: changed}), mount)
    assert "Zq9" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.output_dir=runs", "run.output_dir=runs"),
        ("run.output_dir=/mnt/dist-ft/runs", "run.output_dir=/mnt"),
        ("data.train=[{source: a.jsonl}]", "data.train.0.source=a.jsonl"),
        ("data.train=[{source: /mnt/dist-ft/a.jsonl}]", "data.train.0.source=/mnt"),
        ("data.eval=./e.jsonl", "data.eval=./e.jsonl"),
        ("data.cache_dir=/mnt/dist-ft/cache", "data.cache_dir=/mnt"),
        ("data.loader.replicas=[c]", "data.loader.replicas.0=c"),
        ("data.chat_template=t.jinja", "data.chat_template=t.jinja"),
        ("model.name=./m", "model.name=./m"),
        ("method.init_from=adapters/a", "method.init_from=adapters/a"),
    ],
)
def test_without_a_volume_a_path_that_pods_would_share_is_refused(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)}.*: the overlay's head mounts no persistentVolumeClaim"):
        on_volume(_config(tmp_path, *IN_A_STORE, override), None)


@pytest.mark.parametrize(
    "override",
    ["model.name=/opt/models/m", "data.train=[{source: 'embedded:orders/train'}]", "data.train=[{source: org/name}]",
     "data.chat_template=chatml", "data.cache_dir=s3://b/cache"],
)  # fmt: skip
def test_without_a_volume_what_is_in_the_image_on_a_hub_or_at_a_url_is_taken(tmp_path: Path, override: str) -> None:
    config = _config(tmp_path, "run.output_dir=s3://b/runs", IN_A_STORE[1], override)
    assert on_volume(config, None) == config


@pytest.mark.parametrize(
    ("objective", "key", "expected"),
    [
        ("{kind: dpo, reference: refs/a}", "reference", "/mnt/dist-ft/refs/a"),
        ("{kind: kto}", "reference", None),
        ("{kind: distill, teacher: ./teachers/a}", "teacher", "/mnt/dist-ft/teachers/a"),
        ("{kind: distill, teacher: org/model}", "teacher", "org/model"),
        ("{kind: distill, teacher: smollm2-135m-instruct}", "teacher", "smollm2-135m-instruct"),
    ],
)
def test_the_frozen_model_of_an_objective_is_on_the_volume_too(
    tmp_path: Path, objective: str, key: str, expected: str | None
) -> None:
    config = on_volume(_config(tmp_path, f"objective={objective}"), MOUNT)
    assert config.objective.model_dump()[key] == expected
    with pytest.raises(ConfigError, match=r"objective\.teacher=~/a: pods have no such home"):
        on_volume(_config(tmp_path, "objective={kind: distill, teacher: ~/a}"), MOUNT)

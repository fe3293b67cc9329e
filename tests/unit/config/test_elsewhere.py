"""What of a config can be checked on a machine that will not run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config, check_config_elsewhere, config_from_dict
from dist_ft.errors import ConfigError


def config(**sections: Any) -> Config:
    base = {
        "run": {"name": "a", "output_dir": "/shared/runs"},
        "model": {"name": "org/model"},
        "data": {"train": [{"source": "embedded:orders/train"}]},
    }
    return config_from_dict(base | sections)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"name": "tiny-random"}},
        {"model": {"name": "/shared/models/none-such"}},
        {"data": {"train": [{"source": "/shared/none-such.jsonl"}], "eval": 0.1, "chat_template": "/shared/t.jinja"}},
        {"method": {"kind": "lora", "init_from": "/shared/adapter"}},
    ],
)
def test_files_of_other_machines_need_not_be_here(sections: dict[str, Any]) -> None:
    check_config_elsewhere(config(**sections))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"run": {"name": "a"}}, "run.output_dir=runs is a relative path"),
        ({"model": {"name": "./here"}}, "model.name=./here is"),
        ({"model": {"name": "~/here"}}, "model.name=~/here is"),
        ({"model": {"name": "there"}}, "model.name=there is"),
        ({"data": {"train": [{"source": "a.jsonl"}]}}, "data.train.0.source=a.jsonl is"),
        ({"data": {"train": [{"source": "/a.jsonl"}], "eval": "b.jsonl"}}, "data.eval=b.jsonl is"),
        ({"data": {"train": [{"source": "/a.jsonl"}], "chat_template": "t.jinja"}}, "data.chat_template=t.jinja is"),
        ({"method": {"kind": "lora", "init_from": "adapter"}}, "method.init_from=adapter is"),
        ({"eval": {"metrics": ["exact_match"]}}, "needs held-out data"),
    ],
)
def test_paths_that_depend_on_the_directory_and_broken_rules_are_refused(
    sections: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_config_elsewhere(config(**sections))

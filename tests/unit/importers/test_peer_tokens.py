"""An imported config makes the tokens, and trains those, that the other tool does.

peer_tokens.json holds what the tools made of the same rows, as benchmarks/peer_tokens.py recorded it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_ft.config.data_sections import DataConfig
from dist_ft.data.rows.formats import read_record
from dist_ft.importers.run_import import import_file, nested
from dist_ft.importers.verdicts import Options
from dist_ft.model.chat.render import Renderer
from dist_ft.model.chat.templates import template_text
from dist_ft.records import Completion, Sample
from tests.helpers.peer_cases import CASES, Case, config_of, recorded, tokenizer, trained_ranges

RECORDED: dict[str, list[Any]] = json.loads(Path(__file__).with_name("peer_tokens.json").read_text(encoding="utf-8"))


def imported(case: Case, folder: Path) -> DataConfig:
    """Return the section `data` that a case's config becomes."""
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(config_of(case, folder)), encoding="utf-8")
    result = import_file(case.tool, path, Options(gpus=1))
    assert not result.refused, result.refused
    return DataConfig.model_validate(nested(result.settings)["data"])


@pytest.mark.parametrize("name", CASES)
def test_rows_become_the_tokens_of_the_other_tool(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    data = imported(case, tmp_path)
    source = data.train[0]
    tokens = tokenizer(case.eos, case.bos)
    tokens.chat_template = template_text(data) or tokens.chat_template
    renderer = Renderer(tokens, data.train_on)
    records = [read_record(row, source.format, source.columns, source.ignore, source.prompt) for row in case.rows]
    ours = [
        [" ".join(map(str, sample.input_ids)), trained_ranges(sample.trained)]
        for sample in map(only, map(renderer, records))
    ]
    assert recorded(ours)["first"] == RECORDED[name]["first"]
    assert recorded(ours)["digests"] == RECORDED[name]["digests"]


def test_a_prompt_for_generation_is_the_text_before_the_answer(tmp_path: Path) -> None:
    case = CASES["axolotl own format"]
    source = imported(case, tmp_path).train[0]
    record = read_record(case.rows[0], source.format, source.columns, source.ignore, source.prompt)
    assert isinstance(record, Completion)
    assert Renderer(tokenizer(case.eos, case.bos)).prompt(record) == f"<s>{record.prompt}"
    assert record.question() is not None


def only(samples: list[Sample]) -> Sample:
    """Return the one sample of a row."""
    (sample,) = samples
    return sample

"""An imported config trains as the other tool does: the losses of LLaMA-Factory and TRL on the same rows.

`benchmarks/peer_losses.py` took their numbers: float32, five steps of four rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dist_ft.config import Config
from dist_ft.importers.run_import import import_file, nested
from dist_ft.importers.verdicts import Options
from tests.helpers.attempts import train
from tests.helpers.peer_runs import RUNS, write
from tests.helpers.ranks import RankServer

RECORDED: dict[str, list[float]] = json.loads((Path(__file__).parent / "peer_losses.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_an_imported_config_has_the_losses_of_the_other_tool(name: str, tmp_path: Path, ranks: RankServer) -> None:
    keys = write(name, tmp_path)
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    result = import_file(RUNS[name][0], path, Options(gpus=1))
    # What no file of TRL says: the order of the rows, and an adapter to start from.
    settings = result.settings | {"data.shuffle": False}
    if name == "trl lora":
        settings["method.init_from"] = str(tmp_path / "adapter")
    found = train(ranks, Config.model_validate(nested(settings)))
    assert not result.refused
    # Losses are some 5 nats; sums in another order differ in the sixth digit.
    assert list(found.losses.values()) == pytest.approx(RECORDED[name], abs=1e-4)

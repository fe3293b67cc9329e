"""`dist-ft compare`: the keys that differ and what became of each run, as text and as a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.config import config_from_dict, dump_yaml
from dist_ft.layout import RunDir
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json
from tests.helpers.pages import check_inert, texts_of
from tests.helpers.rows import step_row


def make(root: Path, name: str, lr: float, losses: list[float]) -> Path:
    run = RunDir(root / name)
    record = RunRecord(name, "completed", attempt=1, step=len(losses), max_steps=len(losses), world_size=2)
    write_json(run.run_json, asdict(record))
    config = {
        "run": {"name": name, "output_dir": str(root)}, "model": {"name": "tiny-random"}, "optimizer": {"lr": lr},
        "data": {"train": [{"source": "embedded:orders/train"}]},
    }  # fmt: skip
    run.config.write_text(dump_yaml(config_from_dict(config)), encoding="utf-8")
    import json

    rows = [json.dumps(step_row(step + 1, loss=loss).to_dict()) + "\n" for step, loss in enumerate(losses)]
    run.metrics.write_text("".join(rows), encoding="utf-8")
    evals = [{"step": step + 1, "attempt": 1, "eval_loss": loss} for step, loss in enumerate(losses)]
    run.evals.write_text("".join(json.dumps(row) + "\n" for row in evals), encoding="utf-8")
    return run.path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["dist-ft", "compare", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_what_differs_is_named_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(tmp_path, "slow", 1e-4, [3.0, 2.5, 2.75]), make(tmp_path, "fast", 5e-4, [3.0, 1.5, 1.25])]
    page = tmp_path / "page.html"
    assert call(monkeypatch, *map(str, runs), "--to", str(page)) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["optimizer.lr"] == ["optimizer.lr", "0.0001", "0.0005"]
    assert "run.name" not in rows and "model.name" not in rows
    assert rows["training loss, last"][-2:] == ["2.7500", "1.2500"]
    assert rows["held-out loss, best"][-8:] == ["2.5000", "at", "step", "2", "1.2500", "at", "step", "3"]
    check_inert(page.read_text())
    shown = texts_of(page.read_text())
    for said in ("slow", "fast", "0.0005", "1.2500 at step 3", "Held-out loss", "Training loss, smoothed"):
        assert said in shown


def test_runs_of_one_name_are_told_apart_and_one_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(tmp_path / folder, "same", 1e-4, [1.0]) for folder in ("a", "b")]
    assert call(monkeypatch, *map(str, runs)) == 0
    assert "a/same" in capsys.readouterr().out
    assert call(monkeypatch, str(runs[0])) == 2
    assert call(monkeypatch, str(runs[0]), str(tmp_path / "no-run")) == 2

"""A run that gets worse, through the command line: it stops early, keeps its best, and `dist-ft eval` says the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dist_ft.layout import RunDir
from tests.helpers.paths import ROOT
from tests.helpers.rows import last_rows, read_rows

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"
SETTINGS = [
    "eval.every_steps=2", "eval.early_stopping={patience: 2}", "eval.best_metric=eval_loss",
    "eval.metrics=[exact_match, json_valid, rouge_l]", "eval.max_rows=40", "eval.max_new_tokens=4",
]  # fmt: skip
STEERED = ("eval_loss", "token_accuracy", "perplexity")


def run(cli: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([cli, *arguments], capture_output=True, text=True, timeout=200, check=False)


def held_out(output_dir: Path) -> str:
    """Rows of letters that the training rows lack: what is learnt of those makes these less likely, step by step."""
    path = output_dir / "held-out.jsonl"
    if not path.exists():
        turns = [(f"Скажи число {n}", f"Это число {n * 37 % 101}") for n in range(60)]
        rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return f"data.eval={path}"


def train(cli: str, output_dir: Path, address: str, *more: str) -> tuple[int, dict[str, Any]]:
    place = [f"run.output_dir={output_dir}", f"cluster.address={address}", held_out(output_dir)]
    done = run(cli, "train", str(CONFIG), *place, *SETTINGS, "--json", *more)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def finished(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> dict[str, Any]:
    code, result = train(cli, tmp_path_factory.mktemp("steered"), ray_address)
    assert (code, result["state"], result["error"]) == (0, "completed", None)
    return result


def test_the_run_ends_early_and_links_its_best(finished: dict[str, Any]) -> None:
    run_dir = RunDir(Path(finished["run_dir"]))
    assert finished["early_stop"] == {"metric": "eval_loss", "best_step": finished["best_step"], "patience": 2}
    assert finished["steps"] == finished["best_step"] + 4 < 20
    assert (run_dir.exports / "best").resolve() == run_dir.export(finished["best_step"])
    assert (run_dir.exports / "final").resolve() == run_dir.export(finished["steps"])
    assert [row["step"] for row in read_rows(run_dir.ledger) if row["event"] == "early_stop"] == [finished["steps"]]


def test_models_are_compared_and_answers_kept(finished: dict[str, Any]) -> None:
    run_dir = RunDir(Path(finished["run_dir"]))
    steps = {"base": 0, "tuned": finished["steps"], "best": finished["best_step"]}
    assert list(finished["comparison"]) == list(steps)
    for name, step in steps.items():
        row = last_rows(run_dir.evals)[step]
        assert set(row) == {"step", "attempt", *STEERED, "exact_match", "json_valid", "rouge_l"}
        assert finished["comparison"][name] == {key: row[key] for key in row if key not in ("step", "attempt")}
    kept = read_rows(run_dir.samples(finished["steps"]))
    assert len(kept) == 20
    assert set(kept[0]) == {"prompt", "reference", *steps}
    assert finished["evaluation"]["num_rows"] == 40


def test_a_run_that_ended_early_is_complete(finished: dict[str, Any], cli: str, ray_address: str) -> None:
    run_dir = RunDir(Path(finished["run_dir"]))
    before = run_dir.ledger.read_bytes()
    code, again = train(cli, run_dir.path.parent, ray_address, "--resume")
    assert (code, again["steps"], again["comparison"]) == (0, finished["steps"], finished["comparison"])
    assert run_dir.ledger.read_bytes() == before


def test_eval_finds_what_the_run_has_found(finished: dict[str, Any], cli: str, tmp_path: Path) -> None:
    rows = held_out(Path(finished["run_dir"]).parent)
    place = [str(CONFIG), f"run.output_dir={tmp_path}", rows, *SETTINGS, "--json"]
    done = run(cli, "eval", finished["run_dir"], *place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["models"]) == ["base", "tuned", "best"]
    for name, values in finished["comparison"].items():
        assert found["models"][name] == pytest.approx(values, rel=1e-4), name
    # The export is a model like any other.
    alone = json.loads(run(cli, "eval", finished["export_dir"], *place).stdout)
    assert alone["models"]["model"] == found["models"]["tuned"]


@pytest.mark.parametrize(
    ("target", "more", "words"),
    [
        ("nowhere", (), "neither a run"),
        (".", (), "neither a run"),
        ("RUN", ("data.eval=null", "eval.metrics=[]"), "set data.eval"),
        ("RUN", ("--step", "3"), "no checkpoint at step 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    target: str, more: tuple[str, ...], words: str, finished: dict[str, Any], cli: str
) -> None:
    done = run(cli, "eval", finished["run_dir"] if target == "RUN" else target, str(CONFIG), *more)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr

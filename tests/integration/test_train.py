"""`dist-ft train` on a real Ray: train, stop, resume, export, status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from tests.helpers.cluster import command_line, descendants
from tests.helpers.paths import ROOT
from tests.helpers.rows import last_rows, read_rows

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"


def command(cli: str, tmp_path: Path, address: str, *overrides: str) -> list[str]:
    return [
        cli, "train", str(CONFIG), f"run.output_dir={tmp_path}", f"cluster.address={address}", "--json", *overrides
    ]  # fmt: skip


def run(cli: str, tmp_path: Path, address: str, *overrides: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        command(cli, tmp_path, address, *overrides), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def wait_for_step(run_dir: RunDir, step: int, process: subprocess.Popen[str]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if run_dir.run_json.exists() and read_json(run_dir.run_json)["step"] >= step:
            return read_json(run_dir.run_json)
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def finished(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> RunDir:
    """A completed LoRA run, shared by the tests that only look."""
    tmp_path = tmp_path_factory.mktemp("finished")
    code, result, _ = run(cli, tmp_path, ray_address, "method={kind: lora, r: 4}", "zero.stage=3")
    assert (code, result["state"], result["steps"], result["attempts"]) == (0, "completed", 20, 1)
    assert result["error"] is None
    return RunDir(Path(result["run_dir"]))


def test_the_run_directory_holds_what_the_design_says(finished: RunDir) -> None:
    rows = read_rows(finished.metrics)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert {row["world_size"] for row in rows} == {2}
    assert rows[-1]["position"] == 160
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert set(rows[0]) >= {
        "step", "attempt", "world_size", "epoch", "position", "loss", "lr", "grad_norm", "trained_tokens",
        "tokens", "tokens_per_s", "step_s", "data_s", "digest",
    }  # fmt: skip
    evals = last_rows(finished.evals)
    assert set(evals) == {0, 20}
    assert evals[20]["eval_loss"] < evals[0]["eval_loss"]
    events = [entry["event"] for entry in read_rows(finished.ledger)]
    assert events[0] == "attempt"
    assert events.count("commit") == 2
    assert events[-1] == "completed"
    assert "first_step" in events
    assert (finished.path / "config.yaml").exists()
    assert (finished.exports / "final" / "adapter_model.safetensors").exists()
    assert list((finished.path / "wandb").glob("offline-run-*")), "one offline W&B run"
    assert len(list((finished.path / "wandb").glob("offline-run-*"))) == 1


def test_the_adapter_loads_with_stock_peft_and_computes_the_trained_logits(finished: RunDir) -> None:
    code = """
import json, sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from safetensors import safe_open
run = Path(sys.argv[1]); export = run / "exports" / "final"
adapter = json.loads((export / "adapter_config.json").read_text())
adapter["base_model_name_or_path"] = sys.argv[2]
(export / "adapter_config.json").write_text(json.dumps(adapter))
model = AutoPeftModelForCausalLM.from_pretrained(export, dtype=torch.float32)
probe = json.loads(next((run / "checkpoints").glob("step-00000020*/manifest.json")).read_text())["probe"]
with torch.no_grad():
    logits = model(torch.tensor([probe["tokens"]])).logits[0][:, probe["columns"]]
    with model.disable_adapter():
        base = model(torch.tensor([probe["tokens"]])).logits[0][:, probe["columns"]]
wanted = torch.tensor(probe["logits"])
print(json.dumps({
    "difference": float((logits - wanted).abs().max()), "change": float((base - wanted).abs().max()),
    "template": bool(AutoTokenizer.from_pretrained(export).chat_template),
}))
"""
    base = subprocess.run(
        [sys.executable, "-c", "from dist_ft.model.embedded import materialise; print(materialise('tiny-random'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished.path), base], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 1e-4
    assert found["change"] > 1e-2, "the adapter must do something"
    assert found["template"]


def test_status_reads_files_only(finished: RunDir, cli: str) -> None:
    done = subprocess.run([cli, "status", str(finished.path), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["state"], found["step"], found["max_steps"], found["attempt"]) == ("completed", 20, 20, 1)
    assert [c["step"] for c in found["checkpoints"]] == [10, 20]


def test_export_of_an_earlier_step_merged_loads_with_stock_transformers(
    finished: RunDir, cli: str, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    subprocess.run(
        [cli, "export", str(finished.path), "--step", "10", "--merge", "--to", str(target)],
        check=True,
        timeout=120,
    )
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()), all(torch.isfinite(p).all() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["107200", "True"]
    again = subprocess.run(
        [cli, "export", str(finished.path), "--to", str(target)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_resume_of_a_complete_run_prints_its_result(finished: RunDir, cli: str, ray_address: str) -> None:
    before = finished.ledger.read_bytes()
    code, result, _ = run(
        cli, finished.path.parent, ray_address, "method={kind: lora, r: 4}", "zero.stage=3", "--resume"
    )
    assert (code, result["state"], result["steps"]) == (0, "completed", 20)
    assert finished.ledger.read_bytes() == before


def test_another_seed_is_refused_with_both_values(finished: RunDir, cli: str, ray_address: str) -> None:
    before = finished.ledger.read_bytes()
    done = subprocess.run(
        command(
            cli, finished.path.parent, ray_address, "method={kind: lora, r: 4}", "run.seed=9", "train.max_steps=30",
            "--resume",
        ),
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert "seed: checkpoint 0, config 9" in done.stderr
    assert finished.ledger.read_bytes() == before


@pytest.mark.parametrize("how", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.faults), "stop"])
def test_a_stopped_and_resumed_run_ends_bitwise_as_an_undisturbed_one(
    how: str, cli: str, tmp_path: Path, ray_address: str
) -> None:
    process = subprocess.Popen(
        command(cli, tmp_path, ray_address, "train.max_steps=200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_dir = RunDir(tmp_path / "full")
    wait_for_step(run_dir, 3, process)
    if how == "stop":
        stopped = subprocess.run(
            [cli, "stop", str(run_dir.path)], capture_output=True, text=True, check=True, timeout=60
        )
        assert "stopped at step" in stopped.stdout
    else:
        os.kill(process.pid, getattr(signal, how))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    result = json.loads(out.splitlines()[-1])
    assert result["state"] == "stopped"
    done_steps = result["steps"]
    assert 3 <= done_steps < 200
    # The learning rate of the remaining steps depends on max_steps: both runs must name the same.
    code, resumed, _ = run(cli, tmp_path, ray_address, f"train.max_steps={done_steps + 5}", "--resume")
    assert (code, resumed["attempts"]) == (0, 2)
    rows = last_rows(run_dir.metrics)
    assert sorted(rows) == list(range(1, done_steps + 6))
    assert rows[done_steps]["attempt"] == 1
    assert rows[done_steps + 1]["attempt"] == 2
    assert [rows[s]["position"] for s in sorted(rows)] == [8 * s for s in sorted(rows)]
    assert read_json(run_dir.run_json)["sink_ids"].keys() == {"wandb"}


def test_a_killed_supervisor_takes_its_rank_along(cli: str, tmp_path: Path, session_ray: tuple[str, int]) -> None:
    ray_address, ray_pid = session_ray
    process = subprocess.Popen(
        command(cli, tmp_path, ray_address, "train.max_steps=2000", "failure.max_restarts=0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    record = wait_for_step(RunDir(tmp_path / "full"), 2, process)
    rank = record["workers"][0]["pid"]
    supervisors = [pid for pid in descendants(ray_pid) if b"RayTrainWorker" in command_line(pid)]
    assert len(supervisors) == 2
    for pid in (process.pid, *supervisors):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(), "a process with ray must not hold torch"
    os.kill(supervisors[0], signal.SIGKILL)
    os.kill(supervisors[1], signal.SIGKILL)
    deadline = time.monotonic() + 2
    while any(Path(f"/proc/{w['pid']}").exists() for w in record["workers"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{rank}").exists()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out.splitlines()[-1])["state"] == "failed"

"""A whole run in a bucket: refused requests, a killed rank, a killed driver; and the same model as on a disk.

The server is moto's, on loopback. What counts is what lies in the bucket; scratch directories are new with each driver.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import dump_yaml
from dist_ft.data.stream.loader import NUM_FETCHERS
from dist_ft.run.place import RECORDS, Run, open_run
from dist_ft.storage.objects import open_store
from dist_ft.storage.publish import read_json
from tests.helpers.cluster import LoopbackCluster
from tests.helpers.configs import tiny_config
from tests.helpers.rows import last_rows, read_rows
from tests.helpers.s3 import SECRET, Fault, S3Server, s3_server

STEPS = 40


@dataclass
class Bench:
    """A bucket, a Ray whose processes know how to reach it, and a config."""

    server: S3Server
    bucket: str
    address: str
    folder: Path
    cli: str

    def start(self, name: str, output_dir: str, *more: str) -> subprocess.Popen[str]:
        """Starts a run in the background."""
        command = [
            self.cli, "train", "config.yaml", "--json", f"run.name={name}", f"run.output_dir={output_dir}",
            f"cluster.address={self.address}", *more,
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
        )

    def object(self, name: str) -> bytes | None:
        """Returns an object of the bucket."""
        return self.server.object(f"{self.bucket}/runs/{name}")

    def until_committed(self, name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Waits for the first checkpoint in the bucket; returns run.json as it is there."""
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            record = json.loads(self.object(f"{name}/run.json") or b"{}")
            manifests = [key for key in self.server.names(self.bucket) if f"{name}/" in key and "manifest" in key]
            if manifests and len(record.get("workers", [])) == 2:
                return dict(record)
            time.sleep(0.02)
        raise AssertionError(f"no checkpoint in {self.bucket}")


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits for a run to end well, and returns its result."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, f"{out}\n{err}"
    return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, cli: str) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("objects")
    # Three parts, so that the cluster prepares them.
    changes = {"data__eval": None, "data__part_mib": 0.002}
    config = tiny_config(folder, train__max_steps=STEPS, checkpoint__every_steps=10, **changes)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    with s3_server() as server:
        cluster = LoopbackCluster(head_cpus=4)
        try:
            yield Bench(server, server.new_bucket(), cluster.address, folder, cli)
        finally:
            cluster.close()


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Run:
    """The run in a directory."""
    result = finish(bench.start("local", str(bench.folder / "runs")))
    return open_run(result["run_dir"])


def check_same(bench: Bench, run: Run, undisturbed: Run, attempts: int = 2, steps: int = STEPS) -> None:
    """What lies in the bucket is what the undisturbed run left on the disk, and nothing secret."""
    run.fetch(*RECORDS)
    assert read_json(run.run_json)["state"] == "completed"
    found, wanted = last_rows(run.metrics), last_rows(undisturbed.metrics)
    assert sorted(found) == list(range(1, steps + 1))
    assert {step: row["digest"] for step, row in found.items()} == {s: row["digest"] for s, row in wanted.items()}
    assert {step: row["loss"] for step, row in found.items()} == {s: row["loss"] for s, row in wanted.items()}
    export = run.pointed_at("exports/final")
    assert export == f"exports/step-{steps:08d}"
    weights = (undisturbed.exports / "final" / "model.safetensors").read_bytes()
    assert run.store.read(f"{export}/model.safetensors") == weights
    logs = run.store.names("logs")
    last = f"attempt-{attempts:04d}"
    assert [name.rsplit("/", 1)[1] for name in logs if last in name] == ["rank-00000.log", "rank-00001.log"]
    leaks = [name for name, data in bench.server.objects(bench.bucket).items() if SECRET.encode() in data]
    assert not leaks
    assert bench.server.unfinished_uploads(bench.bucket) == 0


@pytest.mark.faults
def test_a_killed_rank_and_refused_requests_change_nothing(bench: Bench, undisturbed: Run, tmp_path: Path) -> None:
    """Rows, token shards and the run are all in the bucket; requests are refused, bodies cut short or slow."""
    rows = (bench.folder / "train.jsonl").read_bytes()
    open_store(f"{bench.bucket}/rows").put("train.jsonl", [rows])
    data = [f"data.train=[{{source: '{bench.bucket}/rows/*.jsonl'}}]", f"data.loader.cache_dir={tmp_path}"]
    refused = [Fault("503", method, "runs/", times=60, every=9) for method in ("GET", "PUT", "HEAD")]
    broken = [Fault(kind, "GET", pattern) for kind in ("truncated", "slow") for pattern in ("rows/train", r"\.arrow")]
    bench.server.faults[:] = [*broken, *refused]
    process = bench.start("rank", f"{bench.bucket}/runs", *data)
    record = bench.until_committed("rank", process)
    os.kill(record["workers"][1]["pid"], signal.SIGKILL)
    result = finish(process)
    assert result["attempts"] == 2
    assert sum(fault.done for fault in refused) > 10
    assert [fault.done for fault in broken] == [1, 1, 1, 1]
    cache = [name for name in bench.server.names(bench.bucket) if ".dist-ft-cache" in name]
    assert len([name for name in cache if name.endswith(".arrow")]) == 3
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    bench.server.faults.clear()
    run = open_run(f"{bench.bucket}/runs/rank")
    assert (result["run_dir"], result["export_dir"]) == (run.address, f"{run}/exports/step-{STEPS:08d}")
    check_same(bench, run, undisturbed)
    starts = [row["start_step"] for row in read_rows(run.ledger) if row["event"] == "attempt"]
    assert starts[0] == 0 and starts[1] >= 10


@pytest.mark.faults
def test_a_run_in_a_bucket_is_submitted_to_this_machine(bench: Bench, undisturbed: Run) -> None:
    command = [bench.cli, "submit", "config.yaml", "--to", "local", "--no-preflight", "--follow", "run.name=behind",
               f"run.output_dir={bench.bucket}/runs", f"cluster.address={bench.address}"]  # fmt: skip
    done = subprocess.run(command, cwd=bench.folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    run = open_run(f"{bench.bucket}/runs/behind")
    assert f"completed after {STEPS} steps: {run}" in done.stdout
    check_same(bench, run, undisturbed, attempts=1)
    job = done.stdout.split("submitted ")[1].split(";")[0]
    shown = subprocess.run([bench.cli, "status", job, "--json"], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(shown.stdout)
    assert (found["exit_code"], found["run_dir"], found["run"]["state"]) == (0, run.address, "completed")


def test_more_shards_than_the_copies_may_take_come_and_go(bench: Bench, tmp_path: Path) -> None:
    limit_bytes, size = 9_000, ["train.max_steps=9", "data.part_mib=0.0004"]
    plain = open_run(finish(bench.start("whole", str(bench.folder / "runs"), *size))["run_dir"])
    limit = [f"data.loader.cache_dir={tmp_path}", f"data.loader.cache_gib={limit_bytes / (1 << 30)!r}"]
    run = open_run(finish(bench.start("evicted", f"{bench.bucket}/runs", *size, *limit))["run_dir"])
    check_same(bench, run, plain, attempts=1, steps=9)
    prepared = {
        name: len(data) for name, data in bench.server.objects(bench.bucket).items()
        if ".dist-ft-cache" in name and name.endswith((".arrow", ".index.npy"))
    }  # fmt: skip
    copied = {path.name: path.stat().st_size for path in tmp_path.glob("*.[0-9a-f]*.*") if path.suffix != ".lock"}
    num_shards = sum(name.endswith(".arrow") for name in prepared)
    assert num_shards >= 3 * NUM_FETCHERS
    assert sum(copied.values()) <= limit_bytes < sum(prepared.values()) / 2


def test_a_run_whose_driver_was_killed_goes_on_from_the_bucket_alone(
    bench: Bench, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench.start("driver", f"{bench.bucket}/runs")
    bench.until_committed("driver", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # As on another machine: nothing of the first driver's is there.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    again = bench.start("driver", f"{bench.bucket}/runs")
    assert again.wait(100) == 2, "a run that is there is not begun anew"
    assert "exists; continue it with --resume" in again.communicate()[1]
    result = finish(bench.start("driver", f"{bench.bucket}/runs", "--resume"))
    assert result["attempts"] == 2
    check_same(bench, open_run(f"{bench.bucket}/runs/driver"), undisturbed)
    shown = subprocess.run(
        [bench.cli, "status", f"{bench.bucket}/runs/driver", "--json"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(shown)["exports"] == [f"{bench.bucket}/runs/driver/exports/step-{STEPS:08d}"]


@pytest.mark.faults
def test_stop_reaches_a_run_through_the_bucket(bench: Bench) -> None:
    process = bench.start("stopped", f"{bench.bucket}/runs", "train.max_steps=100000")
    bench.until_committed("stopped", process)
    said = subprocess.run(
        [bench.cli, "stop", f"{bench.bucket}/runs/stopped"], capture_output=True, text=True, check=False, timeout=100
    )
    assert "stopped at step" in said.stdout, said.stderr
    assert process.wait(60) == 3
    assert bench.object("stopped/stop-request.json") is None

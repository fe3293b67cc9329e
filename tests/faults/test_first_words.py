"""A member of the group that ends before its first word ends the run with the reason; nobody waits for it for ever."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dist_ft.storage.publish import read_json
from tests.helpers.faults import INJECT
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.faults

WORKERS = "dist_ft.orchestrate.workers"
MEMBERS = {
    "controller": (
        f"{WORKERS}.scaling:ElasticPolicy.make_decision_for_non_running_worker_group",
        "no worker group could be formed, 4 times in a row",
    ),
    "rank": (f"{WORKERS}.child:_run_rank", "died (exit status 7)"),
    "supervisor": (f"{WORKERS}.ray_group:RemoteCoordinator.__init__", "the last try ended with: The actor is dead"),
    "coordinator": ("dist_ft.coordinator.calls:CoordinatorCalls.begin", "the coordinator died"),
    "task": (f"{WORKERS}.child:_run_task", "task prepare died (exit status 7)"),
}
"""Where each ends, and what the run says of it. A fork server that cannot start is in `test_processes.py`."""

BEFORE_RECORDS = ("coordinator", "task")
"""Members without which a run has no records yet; the error stands on standard error then."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_that_ends_before_its_first_word_ends_the_run(cli: str, tmp_path: Path, member: str) -> None:
    where, said = MEMBERS[member]
    settings = [f"run.output_dir={tmp_path}", "train.max_steps=2", "data.eval=null", "eval.metrics=[]",
                "monitor.wandb=disabled", "cluster.start_timeout_s=60", "failure.backoff_s=0.1"]  # fmt: skip
    done = subprocess.run(
        [cli, "train", str(ROOT / "configs" / "smoke" / "full.yaml"), "--json", *settings],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(INJECT), "DIST_FT_TEST_MUTE": where},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    record = tmp_path / "full" / "run.json"
    assert record.exists() == (member not in BEFORE_RECORDS)
    if record.exists():
        assert read_json(record)["state"] == "failed"
        assert said in json.loads(done.stdout.splitlines()[-1])["error"]["message"]
    else:
        assert said in done.stderr

"""The service as the unchanged `openai` client for Node sees it, in tests/node (`make service-node`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.api_server import api_server
from tests.helpers.paths import ROOT

CLIENT = ROOT / "build" / "node"
pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(not (CLIENT / "node_modules" / "openai").exists(), reason="no client (make service-node)"),
]


def test_the_client_for_node_is_served(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "node" / "openai.test.mjs", CLIENT)  # beside what it imports
    with api_server(tmp_path) as server:
        env = {**os.environ, "DIST_FT_URL": server.url, "DIST_FT_KEY": server.client().api_key}
        done = subprocess.run(["node", "--test", "."], cwd=CLIENT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# pass 4" in done.stdout

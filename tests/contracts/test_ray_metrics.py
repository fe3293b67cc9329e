"""Numbers at Ray's own metrics endpoint, and the Grafana dashboard that shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from dist_ft.monitor.ray_metrics import EVAL, GAUGES, NODE, OTHER, STEP, gauge_name
from dist_ft.monitor.sink import step_numbers
from tests.helpers.paths import ROOT
from tests.helpers.rows import step_row

COSTS = ("run/recovery_s", "checkpoint/blocked_s", "checkpoint/written_s")
EXPORTED = {f"ray_{gauge_name(number)}" for number in (*GAUGES, STEP, OTHER, EVAL, NODE)}

# In a process of its own: Ray reads the token of the session's cluster when it is imported.
_DRIVER = """
import sys, time, urllib.request, ray
from dist_ft.metric_rows import EvalRow
from dist_ft.monitor.ray_metrics import RayMetrics
from tests.helpers.rows import step_row
ray.init(address=sys.argv[1], log_to_driver=False)
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
metrics = {"system/10.0.0.1/cpu_percent": 12.5, "system/10.0.0.1/gpu3_power_w": 250.0, "mfu": 0.5, "margin": 0.25,
           "run/recovery_s": 3.0, "checkpoint/blocked_s": 0.1, "checkpoint/written_s": 1.0}
sink = RayMetrics("my-run")
sink.log_step(step_row(7, 2, loss=0.125, goodput=0.75, metrics=metrics))
sink.log_eval(EvalRow(7, 2, {"eval_loss": 1.5, "rouge_l": None}))
deadline = time.monotonic() + 100
lines = []
while len({line.partition("{")[0] for line in lines}) < int(sys.argv[2]) and time.monotonic() < deadline:
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.startswith("ray_dist_ft_")]
    time.sleep(0.2)  # Ray's agent collects every few seconds
print("\\n".join(lines))
"""


def test_every_number_stands_at_the_endpoint_of_ray(ray_address: str) -> None:
    command = [sys.executable, "-c", _DRIVER, ray_address, str(len(EXPORTED))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.partition("{")[0] for line in lines} == EXPORTED
    assert all('run="my-run"' in line for line in lines)
    assert _value(lines, "ray_dist_ft_step") == 7
    assert _value(lines, "ray_dist_ft_train_loss") == 0.125
    assert _value(lines, "ray_dist_ft_perf_mfu") == 0.5
    assert _value(lines, "ray_dist_ft_train_metric", 'name="margin"') == 0.25
    assert _value(lines, "ray_dist_ft_eval", 'name="eval_loss"') == 1.5
    assert _value(lines, "ray_dist_ft_node", 'name="cpu_percent"', 'node="10.0.0.1"', 'gpu=""') == 12.5
    assert _value(lines, "ray_dist_ft_node", 'name="power_w"', 'gpu="3"') == 250
    assert not any("rouge_l" in line for line in lines)


def _value(lines: list[str], name: str, *labels: str) -> float:
    (line,) = [line for line in lines if line.startswith(name + "{") and all(label in line for label in labels)]
    return float(line.rsplit(" ", 1)[1])


def test_a_row_has_no_number_without_a_gauge() -> None:
    row = step_row(7, 2, loss=0.5, goodput=0.75, metrics={"mfu": 0.5, **dict.fromkeys(COSTS, 0.5)})
    assert step_numbers(row).keys() - GAUGES.keys() == {
        "data/tokens",
        "data/trained_tokens",
    }  # of one step; see the rate
    assert GAUGES.keys() <= step_numbers(row).keys()


def test_the_dashboard_shows_what_is_exported_and_nothing_else() -> None:
    board: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana" / "dist-ft.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert {name for text in expressions for name in re.findall(r"ray_dist_ft_\w+", text)} == EXPORTED
    assert all('run=~"$run"' in text for text in expressions)
    queried = {variable["name"]: variable.get("definition", "") for variable in board["templating"]["list"]}
    assert queried == {"source": "", "run": "label_values(ray_dist_ft_step, run)"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    areas = [panel["gridPos"] for panel in board["panels"]]
    cells = [(area["x"] + x, area["y"] + y) for area in areas for x in range(area["w"]) for y in range(area["h"])]
    assert len(set(cells)) == len(cells)  # no panel lies over another
    assert max(x for x, _ in cells) < 24

"""Numbers for Prometheus: gauges at the metrics endpoint that every Ray node has.

They stand there beside Ray's own, as `ray_dist_ft_…` with the label `run`; `cluster/grafana/dist-ft.json` shows them. A
gauge is the value of now: nothing is sent again after an outage, and a replayed step is shown as it is.
"""

from __future__ import annotations

import re

from ray.util.metrics import Gauge

from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.sink import SYSTEM, Answers, eval_numbers, step_numbers

GAUGES = {
    "train/loss": "Loss of the step, mean over its trained tokens",
    "train/lr": "Learning rate",
    "train/grad_norm": "Norm of the gradient before clipping",
    "data/epoch": "Epochs completed",
    "data/position": "Sequences used",
    "perf/tokens_per_s": "Tokens a second over all workers",
    "perf/step_s": "Seconds of the step",
    "perf/data_s": "Seconds that rank 0 waited for data",
    "perf/mfu": "Share of the devices' peak that the model's own products take",
    "run/attempt": "Attempts begun",
    "run/world_size": "Workers",
    "run/goodput": "Share of the drivers' time that went into steps that count",
    "run/recovery_s": "Seconds from the last failure or resize until the next group had loaded",
    "checkpoint/blocked_s": "Seconds for which the last checkpoint held training up",
    "checkpoint/written_s": "Seconds until the last checkpoint was on the disk",
}
"""Number of a step, as sinks name it → its description."""
STEP = "step"
OTHER, EVAL, NODE = "train_metric", "eval", "node"
"""Gauges whose label `name` says which number it is: of the objective, of an evaluation, of a node."""
_PREFIX = "dist_ft_"


def gauge_name(number: str) -> str:
    """Return the name of a gauge, such as `dist_ft_train_loss` for `train/loss`; Ray puts `ray_` before it."""
    return _PREFIX + number.replace("/", "_")


class RayMetrics:
    """A sink that sets gauges of Ray. It needs a process that Ray has started.

    Args:
        run: Name of the run, the label `run` of all gauges.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._steps = {number: Gauge(gauge_name(number), text, ("run",)) for number, text in GAUGES.items()}
        self._step = Gauge(gauge_name(STEP), "Completed optimizer steps", ("run",))
        self._other = Gauge(gauge_name(OTHER), "Metrics of the objective", ("run", "name"))
        self._eval = Gauge(gauge_name(EVAL), "Numbers of the last evaluation", ("run", "name"))
        self._node = Gauge(gauge_name(NODE), "What a node is doing", ("run", "name", "node", "gpu"))

    def log_step(self, row: StepRow) -> None:
        """See `Sink`."""
        self._step.set(row.step, self._run)
        for number, value in step_numbers(row).items():
            if number.startswith(SYSTEM):
                _, node, name = number.split("/", 2)
                gpu = re.match(r"gpu(\d+)_", name)
                tags = {"name": name[gpu.end() :] if gpu else name, "node": node, "gpu": gpu[1] if gpu else ""}
                self._node.set(value, {**self._run, **tags})
            elif number in self._steps:
                self._steps[number].set(value, self._run)
            elif number.startswith("train/"):
                self._other.set(value, {**self._run, "name": number.removeprefix("train/")})

    def log_eval(self, row: EvalRow) -> None:
        """See `Sink`."""
        for number, value in eval_numbers(row).items():
            self._eval.set(value, {**self._run, "name": number.removeprefix("eval/")})

    def log_answers(self, answers: Answers) -> None:
        """See `Sink`. Prometheus takes numbers only."""

    def close(self, state: str) -> None:
        """See `Sink`. The gauges go with the process."""

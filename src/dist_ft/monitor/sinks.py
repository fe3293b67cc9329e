"""The sinks that there are, and which of them a config asks for: any number at once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dist_ft.config.schema import MonitorConfig
from dist_ft.monitor import mlflow_sink, wandb_sink
from dist_ft.monitor.alerts import check_alerts
from dist_ft.monitor.sink import Sink, SinkRun


@dataclass(frozen=True)
class SinkKind:
    """One kind of sink.

    Attributes:
        mode: Returns how a config wants it: online, offline or disabled.
        check: Raises ConfigError where the machine cannot do that.
        build: Makes the sink of a run; takes its id and mode.
    """

    mode: Callable[[MonitorConfig], str]
    check: Callable[[MonitorConfig], None]
    build: Callable[[str, str, SinkRun], Sink]


SINKS: dict[str, SinkKind] = {
    "wandb": SinkKind(lambda config: wandb_sink.resolve_mode(config.wandb), lambda config: None, wandb_sink.build),
    "mlflow": SinkKind(
        lambda config: mlflow_sink.resolve_mode(config.mlflow),
        lambda config: mlflow_sink.check(config.mlflow),
        mlflow_sink.build,
    ),
}
"""By their keys in `monitor` and in `sink_ids` of run.json."""


def check_sinks(config: MonitorConfig) -> None:
    """Check the settings of all sinks and of alerts, before a run starts.

    Raises:
        ConfigError: One of them cannot work on this machine.
    """
    for kind in SINKS.values():
        kind.check(config)
    check_alerts(config)


def add_sink_ids(config: MonitorConfig, known: Mapping[str, str]) -> dict[str, str]:
    """Return the id of each sink: those that a run has, and new ones for sinks that the config adds.

    A sink keeps one id over all attempts, also when it is disabled for some of them.
    """
    wanted = {name: uuid.uuid4().hex[:8] for name, kind in SINKS.items() if kind.mode(config) != "disabled"}
    return {**wanted, **known}


def build_sinks(config: MonitorConfig, ids: Mapping[str, str], run: SinkRun) -> list[Sink]:
    """Make the sinks of a run.

    Raises:
        ConfigError: A setting is wrong.
        OSError: A sink cannot write where it is to keep its files.
    """
    modes = {name: kind.mode(config) for name, kind in SINKS.items() if name in ids}
    return [SINKS[name].build(ids[name], mode, run) for name, mode in modes.items() if mode != "disabled"]

"""Finds what `dist-ft eval` measures: a run, a model directory or an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_ft.config import Config, load_config, with_model_dir
from dist_ft.errors import UsageError
from dist_ft.run.place import open_run
from dist_ft.run.status import find_checkpoint, read_record


@dataclass(frozen=True)
class Target:
    """The models to measure, and the config to measure them with.

    Attributes:
        config: The given config, with the base model of the measured models.
        models: Name → directory; None is the config's own model.
        checkpoint: Manifest, relative to the run, of a checkpoint that must be exported and measured as `tuned`.
    """

    config: Config
    models: dict[str, str | None]
    checkpoint: str | None = None


def find_target(address: str, config: Config, step: int | None) -> Target:
    """Return the target at an address.

    Args:
        address: Path or URL of a run; path of a Hugging Face model directory or a PEFT adapter directory.
        config: Config with the held-out data, and with the base model of an adapter.
        step: Step of a run; None takes its exports, or else its last checkpoint.

    Raises:
        UsageError: No model to measure is found, or the config has no data to measure it on.
    """
    if config.data.eval is None:
        raise UsageError("eval needs held-out data; set data.eval in the config")
    run = open_run(address)
    if run.has("run.json"):
        read_record(run)
        run.fetch("config.yaml")
        trained = load_config(run.config)
        config = config.model_copy(update={"model": trained.model, "method": trained.method})
        if step is not None:
            name = run.export_name(step)
            found = {"tuned": name if run.has(name) else None}
        else:
            tuned = run.pointed_at("exports/final") or run.pointed_at("exports/latest")
            found = {"tuned": tuned, "best": run.pointed_at("exports/best")}
        models: dict[str, str | None] = {name: run.address_of(export) for name, export in found.items() if export}
        if models.get("best") == models.get("tuned"):
            models.pop("best", None)
        if "tuned" in models:
            return Target(config, {"base": None, **models})
        return Target(config, {"base": None}, find_checkpoint(run, step)[1])
    path = Path(address)
    if step is not None:
        raise UsageError(f"--step {step} is for runs, but {address} is none (no run.json)")
    if (path / "adapter_config.json").is_file():
        return Target(config, {"base": None, "tuned": str(path.absolute())})
    if (path / "config.json").is_file():
        return Target(with_model_dir(config, str(path.absolute())), {"model": None})
    raise UsageError(
        f"{address} is neither a run (run.json), nor a model (config.json), nor an adapter (adapter_config.json)"
    )

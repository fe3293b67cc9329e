"""What `dist-ft eval` is to measure: a run, a model directory or an adapter, found by its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_ft.config import Config, load_config
from dist_ft.errors import UsageError
from dist_ft.plan.status import find_checkpoint, read_record
from dist_ft.rundir import RunDir


@dataclass(frozen=True)
class Target:
    """What to measure, and with what.

    Attributes:
        config: The config that was given, with the base model of what is measured.
        models: Name → directory; None is the config's own model.
        checkpoint: Manifest of the run, relative to it, that must be exported to be measured as `tuned`.
    """

    config: Config
    models: dict[str, str | None]
    checkpoint: str | None = None


def find_target(path: Path, config: Config, step: int | None) -> Target:
    """Finds out what a path is.

    Args:
        path: A run directory, a Hugging Face model directory or a PEFT adapter directory.
        config: Names the held-out data, and the base model of an adapter.
        step: Step of a run; None takes its exports, else its last checkpoint.

    Raises:
        UsageError: There is nothing to measure, or nothing to measure it on.
    """
    if config.data.eval is None:
        raise UsageError("eval needs held-out data; set data.eval in the config")
    if RunDir(path).run_json.is_file():
        return _run(path, config, step)
    if step is not None:
        raise UsageError(f"--step {step} is for runs, but {path} is none (no run.json)")
    if (path / "adapter_config.json").is_file():
        return Target(config, {"base": None, "tuned": str(path.absolute())})
    if (path / "config.json").is_file():
        place = config.model.model_copy(update={"name": str(path.absolute()), "revision": None})
        return Target(config.model_copy(update={"model": place}), {"model": None})
    raise UsageError(
        f"{path} is neither a run (run.json), nor a model (config.json), nor an adapter (adapter_config.json)"
    )


def _run(path: Path, config: Config, step: int | None) -> Target:
    read_record(path)
    trained = load_config(RunDir(path).config)
    config = config.model_copy(update={"model": trained.model, "method": trained.method})
    exports = RunDir(path.absolute())
    if step is not None:
        found = {"tuned": exports.export(step)}
    else:
        found = {"tuned": exports.exports / "final", "best": exports.exports / "best"}
    models = {name: str(place.resolve()) for name, place in found.items() if place.is_dir()}
    if models.get("best") == models.get("tuned"):
        models.pop("best", None)
    if "tuned" in models:
        return Target(config, {"base": None, **models})
    return Target(config, {"base": None}, find_checkpoint(path, step)[1])

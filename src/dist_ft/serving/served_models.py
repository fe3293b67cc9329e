"""Finds out what is served: a run with its checkpoints, a directory of a model or adapter, a service's store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_ft.config import Config, config_from_dict, load_config, with_model_dir
from dist_ft.engine.protocol import EngineSpec
from dist_ft.errors import DistFtError, UsageError
from dist_ft.machine import has_fast_bfloat16, has_gpu
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.run.exports import FINAL
from dist_ft.run.place import Run, open_run
from dist_ft.run.status import find_checkpoint, read_status
from dist_ft.service.api_keys import Caller
from dist_ft.service.tuning.catalogue import BaseModel
from dist_ft.service.tuning.fine_tuning import FineTuning
from dist_ft.service.tuning.job_store import CHECKPOINT_MARK
from dist_ft.service.wire import ApiError, Object, whole_number
from dist_ft.serving.backend import ServedName, no_model

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """The files of a model: an engine, and the adapter on it."""

    spec: EngineSpec
    adapter: str | None


def found_in(directory: Path, config: Config) -> Found:
    """Return what serves an export.

    Args:
        directory: Of a model or of an adapter.
        config: Names the base model of an adapter.

    Raises:
        UsageError: It is neither.
    """
    if not (directory / _ADAPTER).is_file():
        if not (directory / "config.json").is_file():
            raise UsageError(f"{directory} is neither a model (config.json) nor an adapter (adapter_config.json)")
        return Found(EngineSpec(_only_model(with_model_dir(config, str(directory)))), None)
    base = _only_model(config)
    settings = json.loads((directory / _ADAPTER).read_bytes())
    # PEFT mixes plain LoRA in a batch, and nothing else.
    if settings.get("use_dora"):
        return Found(EngineSpec(base, merged=str(directory)), None)
    return Found(EngineSpec(base), str(directory))


def _only_model(config: Config) -> Object:
    """Return the config of an engine: the same for all runs of a base model."""
    data: Object = {"train": [{"source": "-"}], "chat_template": config.data.chat_template}
    model = config.model.model_dump(mode="json")
    if config.model.torch_dtype == "bfloat16" and not has_gpu() and not has_fast_bfloat16():
        model["dtype"] = "float32"  # some 20 times as fast there
    made = config_from_dict({"run": {"name": "serve", "output_dir": "/"}, "model": model, "data": data})
    return dict(made.model_dump(mode="json"))


class Exports:
    """Exports of checkpoints, made when they are first asked for.

    Args:
        directory: Where those are put that a run has not made itself.
        starter: Returns the socket of a fork server.
    """

    def __init__(self, directory: Path, starter: Callable[[], str]) -> None:
        self._directory, self._starter = directory, starter
        self._one_by_one = threading.Lock()

    def export(self, run: Run, step: int | None) -> tuple[Config, Path]:
        """Return the config of a run and the directory of an export.

        Args:
            run: The run.
            step: Of a checkpoint; None for the result, or else the newest checkpoint.

        Raises:
            DistFtError: There is no such checkpoint, or its export fails.
        """
        name = run.pointed_at(FINAL) if step is None else run.export_name(step)
        if name is not None and not run.is_remote and run.has(name):
            return load_config(run.config), Path(run.address_of(name)).resolve()
        config, checkpoint = find_checkpoint(run, step)
        to = self._directory / f"{config.run.name}-{checkpoint.split('/')[1]}"
        with self._one_by_one:
            if not to.exists():
                run_task(
                    self._starter(),
                    "export",
                    {
                        "config": config.model_dump(mode="json"), "run_dir": run.address, "checkpoint": checkpoint,
                        "to": str(to),
                    },
                )  # fmt: skip
        return config, to


class RunNames:
    """The names of a run: its result, its checkpoints, its base model.

    Args:
        address: Path or URL of the run.
        exports: Where its checkpoints are exported.

    Raises:
        DistFtError: There is no run, or nothing of it can be served yet.
    """

    def __init__(self, address: str, exports: Exports) -> None:
        self._run, self._exports = open_run(address), exports
        config, directory = exports.export(self._run, None)
        self._created = int(directory.stat().st_mtime)
        found, self._name = found_in(directory, config), config.run.name
        self._models = {self._name: self._named(self._name, found)}
        if found.adapter is not None or found.spec.merged is not None:
            base = config.model.name.rstrip("/").rpartition("/")[2]
            self._models[base] = self._named(base, Found(EngineSpec(found.spec.config), None))

    def listed(self, caller: Caller) -> list[Object]:
        """See `Names`."""
        checkpoints = [f"{self._name}{CHECKPOINT_MARK}{saved.step}" for saved in read_status(self._run).checkpoints]
        known = [model.to_wire() for model in self._models.values()]
        return known + [{**known[0], "id": name} for name in checkpoints if name not in self._models]

    def find(self, name: str, caller: Caller) -> ServedName:
        """See `Names`."""
        start, _, step = name.partition(CHECKPOINT_MARK)
        number = whole_number(step)
        if name not in self._models and start == self._name and number is not None:
            try:
                config, directory = self._exports.export(self._run, number)
            except UsageError as error:
                raise no_model(name) from error
            self._models[name] = self._named(name, found_in(directory, config))
        if name not in self._models:
            raise no_model(name)
        return self._models[name]

    def _named(self, name: str, found: Found) -> ServedName:
        return ServedName(name, self._created, "dist-ft", found.spec, found.adapter)


class DirectoryNames:
    """The names of a model directory, or of an adapter directory and its base model.

    Args:
        directory: The directory.

    Raises:
        UserError: It is neither.
    """

    def __init__(self, directory: Path) -> None:
        base = directory
        if (directory / _ADAPTER).is_file():
            named = json.loads((directory / _ADAPTER).read_bytes()).get("base_model_name_or_path")
            if not named:
                raise UsageError(f"{directory}/{_ADAPTER} names no base model; write base_model_name_or_path there")
            base = Path(named)
        model: Object = {"name": str(base), "dtype": _dtype_of(base)}
        config = config_from_dict({"run": {"name": "serve"}, "model": model, "data": {"train": [{"source": "-"}]}})
        found = found_in(directory, config)
        created = int(directory.stat().st_mtime)
        self._models = {directory.name: ServedName(directory.name, created, "dist-ft", found.spec, found.adapter)}
        if base != directory:
            self._models[base.name] = ServedName(base.name, created, "dist-ft", EngineSpec(found.spec.config))

    def listed(self, caller: Caller) -> list[Object]:
        """See `Names`."""
        return [model.to_wire() for model in self._models.values()]

    def find(self, name: str, caller: Caller) -> ServedName:
        """See `Names`."""
        if name not in self._models:
            raise no_model(name)
        return self._models[name]


def _dtype_of(base: Path) -> str:
    """Return the dtype that a model was saved in; half precision becomes bfloat16."""
    if not (base / "config.json").is_file():
        return "bfloat16"
    saved = json.loads((base / "config.json").read_bytes())
    return "float32" if "float32" in (saved.get("dtype"), saved.get("torch_dtype")) else "bfloat16"


class StoreNames:
    """The names of a service: its base models, and the tuned models of the caller's project with their checkpoints.

    Args:
        tuning: Jobs of the store.
        catalogue: Its base models.
        exports: Where checkpoints are exported.
    """

    def __init__(self, tuning: FineTuning, catalogue: dict[str, BaseModel], exports: Exports) -> None:
        self._tuning, self._catalogue, self._exports = tuning, catalogue, exports

    def listed(self, caller: Caller) -> list[Object]:
        """See `Names`."""
        return self._tuning.models(caller)

    def find(self, name: str, caller: Caller) -> ServedName:
        """See `Names`."""
        if name in self._catalogue:
            base = self._catalogue[name]
            return ServedName(name, 0, "dist-ft", EngineSpec(_only_model(_config_of(base))))
        tuned = self._tuning.tuned(name, caller)
        if tuned is None:
            raise no_model(name)
        try:
            config, directory = self._exports.export(self._tuning.run(tuned.job), tuned.step)
            found = found_in(directory, config)
        except DistFtError as error:
            raise ApiError(
                503, f"The model '{name[:200]}' cannot be served: {error}", "model", kind="server_error"
            ) from error
        return ServedName(name, tuned.job.created_at, f"org-{caller.project}", found.spec, found.adapter)


def _config_of(base: BaseModel) -> Config:
    """Return a config with a base model of the catalogue, as its jobs have it."""
    sections = {key: dict(value) for key, value in base.config.items() if isinstance(value, dict)}
    model: Object = {"name": base.model, **sections.get("model", {})}
    data: Object = {"train": [{"source": "-"}], "chat_template": sections.get("data", {}).get("chat_template")}
    return config_from_dict({"run": {"name": "serve"}, "model": model, "data": data})

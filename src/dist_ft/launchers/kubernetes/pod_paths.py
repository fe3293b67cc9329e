"""Translates the paths of a config to those of pods: a shared volume, an object store, a hub, or the image.

Pure: opens nothing. The paths need not exist on this machine.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from dist_ft.config import Config
from dist_ft.config.data_sections import RowSource
from dist_ft.config.paths import EMBEDDED_PREFIX, is_hub_id
from dist_ft.config.training_sections import DistillConfig, DpoConfig, KtoConfig
from dist_ft.errors import ConfigError
from dist_ft.storage.remote import is_remote
from dist_ft.storage.urls import checked_store_url, is_url, shown_url


def on_volume(config: Config, mount: str | None) -> Config:
    """Return the config with relative paths placed on the shared volume; URLs stay as they are.

    Args:
        config: As the user wrote it; its paths need not exist here.
        mount: Where pods mount the volume (`shared_mount`). None: there is none, so that the run, its data and its
            token shards must have URLs; a model or template may be in the image.

    Raises:
        ConfigError: A path of this machine's user, one without a volume, a run directory that is not on it, or a URL of
            no object store.
    """
    pods, data = _Pods(mount), config.data
    sources = [pods.rows(f"data.train.{index}.source", source) for index, source in enumerate(data.train)]
    held_out = data.held_out_at([pods.rows(key, source).source for key, source in data.eval_sources.items()])
    replicas = [pods.kept(f"data.loader.replicas.{index}", place) for index, place in enumerate(data.loader.replicas)]
    changes = {
        "train": sources, "eval": held_out, "cache_dir": pods.kept("data.cache_dir", data.cache_dir),
        "chat_template": pods.below("data.chat_template", data.template_path) or data.chat_template,
        # loader.cache_dir is a path of each pod's own.
        "loader": data.loader.model_copy(update={"replicas": replicas}),
    }  # fmt: skip
    output_dir = pods.kept("run.output_dir", config.run.output_dir)
    init_from = pods.below("method.init_from", config.method.init_from)
    model = pods.model("model.name", config.model.name)
    objective = config.objective
    if isinstance(objective, DpoConfig | KtoConfig):
        reference = pods.below("objective.reference", objective.reference)
        objective = objective.model_copy(update={"reference": reference})
    elif isinstance(objective, DistillConfig):
        objective = objective.model_copy(update={"teacher": pods.model("objective.teacher", objective.teacher)})
    if mount is not None and output_dir is not None and not is_url(output_dir):
        path = PurePosixPath(output_dir)
        if not path.is_relative_to(mount) or ".." in path.parts:
            pods.problems.append(
                f"run.output_dir={config.run.output_dir} is not on the shared volume; name a path below {mount}, a "
                "relative one, or a URL such as s3://bucket/runs"
            )
    if pods.problems:
        raise ConfigError("\n".join(pods.problems))
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": output_dir}),
            "model": config.model.model_copy(update={"name": model}),
            "objective": objective,
            "method": config.method.model_copy(update={"init_from": init_from}),
            "data": data.model_copy(update=changes),
        }
    )


class _Pods:
    """Translates single paths, and collects in `problems` those that pods cannot find.

    Args:
        mount: Where they mount the shared volume, if any.
    """

    def __init__(self, mount: str | None) -> None:
        self.problems: list[str] = []
        self._mount = mount

    def model(self, key: str, name: str) -> str | None:
        """Return the name of a model; without a leading `.` it is one of a hub, or of an embedded model."""
        return self.below(key, name) if name.startswith((".", "~", "/")) else name

    def below(self, key: str, path: str | None, *, may_be_in_image: bool = True) -> str | None:
        """Return a path as pods see it."""
        if path is None or path.startswith(EMBEDDED_PREFIX):
            return path
        if path.startswith("~"):
            self._refuse(key, path, "pods have no such home; name a path on the shared volume")
        elif is_url(path):
            self._refuse(key, path, "this is not read from a URL; name a path on the shared volume")
        elif self._mount is None and not (may_be_in_image and path.startswith("/")):
            self._refuse(
                key,
                path,
                "the overlay's head mounts no persistentVolumeClaim; name a URL where it can be one (the run, rows, "
                "token shards), or take an overlay with a volume that all pods share",
            )
        return str(PurePosixPath(self._mount or "/") / path)

    def kept(self, key: str, address: str | None) -> str | None:
        """Return the address of something that is written: a path on the volume, or a URL of an object store."""
        if address is None or not is_url(address):
            return self.below(key, address, may_be_in_image=False)
        try:
            return checked_store_url(address)
        except ConfigError as error:
            self.problems.append(f"{key}: {error}")
            return address

    def rows(self, key: str, source: RowSource) -> RowSource:
        """Return a source with its address as pods see it."""
        # What can be a hub's data set is one: a folder of the volume is told apart by a leading `./`.
        is_elsewhere = is_hub_id(source.source) or is_remote(source.source)
        place = source.source if is_elsewhere else self.below(key, source.source, may_be_in_image=False)
        return source.model_copy(update={"source": place})

    def _refuse(self, key: str, path: str, why: str) -> None:
        self.problems.append(f"{key}={shown_url(path)}: {why}")

"""Defines the run config: one frozen schema, and the only place with defaults.

Larger sections are in `data_sections.py`, `training_sections.py` and `cluster_sections.py`. `load.py` reads files and
overrides; `rules.py` has the rules that join sections. Validators check and never change a value; derived values are
properties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_ft.config.cluster_sections import ClusterConfig, FailureConfig
from dist_ft.config.data_sections import DataConfig
from dist_ft.config.section import Section
from dist_ft.config.training_sections import (
    AdamWConfig,
    AnyOptimizer,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    SftConfig,
    TrainConfig,
    ZeroConfig,
)
from dist_ft.storage.urls import is_url


class RunConfig(Section):
    """Names the run and its directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Run id and name of the run directory. Default: the config file's stem."""
    output_dir: str = "runs"
    """Parent of the run directory: a path that all machines of the cluster see, or a URL such as `s3://bucket/runs`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds order, dropout and adapter initialisation."""

    @property
    def address(self) -> str:
        """Path or URL of the run directory."""
        if is_url(self.output_dir):
            return f"{self.output_dir.rstrip('/')}/{self.name}"
        return str(Path(self.output_dir).absolute() / self.name)


class CheckpointConfig(Section):
    """Sets when checkpoints are written and which are kept."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = 50
    """Steps between checkpoints; null keeps the last one only. The last step always makes one. `auto` computes the
    time between two from what one costs and how often the run fails (Young 1974, Daly 2006), both measured; the
    ledger has it as `interval`."""
    in_background: bool = True
    """Write while training goes on, from a copy in host memory (12 bytes a trained parameter over all workers). A
    checkpoint that is due while the one before is still being written is left out. A rank whose node has no
    memory for the copies waits for the disk instead, and the ledger says so. False: training waits for the
    disk, and none is left out."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep. What the other rules keep stays besides."""
    keep_best: Annotated[int, Field(ge=1)] = 1
    """Best checkpoints to keep where `eval.best_metric` is set; each step that is one of them gets a checkpoint."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Keep every checkpoint whose step is a multiple of this. Null keeps none for its number."""
    max_gib: Annotated[float, Field(gt=0)] | None = None
    """Most disk space of the kept checkpoints, in GiB; one that is being written comes on top. First go those of
    `keep_every`, then those of `keep_best`, then those of `keep_last`, the oldest first. The newest, the best and
    tagged ones (`dist-ft checkpoint tag`) never go; if they alone are larger, the ledger says so. Null is no limit."""

    @property
    def max_bytes(self) -> int | None:
        """`max_gib` in bytes."""
        return None if self.max_gib is None else int(self.max_gib * (1 << 30))


class ExportConfig(Section):
    """Sets how checkpoints are exported as models, and which are while training goes on.

    The last checkpoint, and the best one, are exported after the training anyway.
    """

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Export the checkpoint of every so many steps while training goes on, for good. A multiple of
    `checkpoint.every_steps`. Null exports none for its number."""
    latest: bool = False
    """Export the newest checkpoint whenever no export is running; `exports/latest` points at the newest export."""
    best: bool = False
    """Export each checkpoint that becomes the best by `eval.best_metric`; `exports/best` points at it."""
    merge: bool = False
    """Fold the adapter into the base model. False exports the adapter alone."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the files; null is `model.dtype`."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    """Threads of an export while training goes on; its process also has a low priority."""


class MonitorConfig(Section):
    """Sets the sinks of metrics besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. `auto` is online with WANDB_API_KEY set and offline without."""
    mlflow: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """MLflow, which needs `pip install dist-ft[mlflow]`. `online` sends to MLFLOW_TRACKING_URI of the environment,
    `offline` writes `mlflow/mlflow.db` in the run directory; `auto` is online where that variable is set."""
    project: str = "dist-ft"
    """W&B project and MLflow experiment."""
    webhook: str | None = None
    """URL that gets a signed event when an attempt fails or hangs, a step is left out, and the run ends. The secret is
    DIST_FT_WEBHOOK_SECRET of the environment (`whsec_` and base64). W&B gets the same as alerts."""
    report_every_s: Annotated[float, Field(gt=0)] | None = 300.0
    """Seconds between two rebuilds of `report.html` in the run directory; the last one is made when the run ends. A
    process of its own makes it, with some seconds of one core at the lowest priority. Null makes none."""


class Config(Section):
    """One run, whole."""

    run: RunConfig
    """What the run is called and where it lives."""
    model: ModelConfig
    """The base model."""
    method: MethodConfig = MethodConfig()
    """Which weights are trained."""
    data: DataConfig
    """Training and held-out data."""
    train: TrainConfig = TrainConfig()
    """Batch, length and memory."""
    eval: EvalConfig = EvalConfig()
    """Measurements."""
    objective: ObjectiveConfig = SftConfig()
    """What is optimised."""
    optimizer: AnyOptimizer = AdamWConfig()
    """The optimizer, by its `kind`: `adamw` (where none is given), `lion`, `schedule_free_adamw`."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding."""
    cluster: ClusterConfig = ClusterConfig()
    """Machines and workers."""
    failure: FailureConfig = FailureConfig()
    """After a failure."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is kept."""
    export: ExportConfig = ExportConfig()
    """What is exported, and when."""
    monitor: MonitorConfig = MonitorConfig()
    """Where numbers go."""

    @model_validator(mode="after")
    def _check_worker_range(self) -> Config:
        if not 1 <= self.cluster.min_workers <= self.cluster.max_workers:
            raise ValueError(
                f"cluster.num_workers={self.cluster.num_workers} is not [min, max] with 1 <= min <= max; "
                "write for example cluster.num_workers=[1, 4]"
            )
        return self

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the run uses.

        bfloat16 at stage 0 runs as stage 1, because DeepSpeed's own path refuses float32 accumulation there and
        counts an Adam step at construction.
        """
        return 1 if self.zero.stage == 0 and self.model.torch_dtype == "bfloat16" else self.zero.stage

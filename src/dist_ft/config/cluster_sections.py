"""The sections of machines and of what happens when one fails: `cluster`, `failure`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_ft.config.section import Section


class ClusterConfig(Section):
    """Machines and workers."""

    address: str | None = None
    """Ray address; null starts a Ray on this machine."""
    num_workers: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=2, max_length=2)] = 1
    """Workers, or `[min, max]`."""
    resources_per_worker: dict[str, float] | None = None
    """Ray resources of a worker. Null: one GPU and one CPU where the cluster has GPUs, else one CPU."""
    memory_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Memory that a worker may use, in GiB. Null means all of its GPU, and no limit on CPUs."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """How long to wait for resources that exist but are busy."""
    allowed_sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """World sizes that the run may have, within num_workers. Null allows every one."""
    grow_after_s: Annotated[float, Field(ge=0)] | None = 30.0
    """Seconds that new machines must have been available before the run grows onto them. Null never grows a run.
    Machines that are about to leave are left at once."""
    grow_if_it_pays: bool = True
    """Grow only if the remaining steps gain more time than a resize costs, both as measured in this run."""

    @property
    def memory_per_worker_bytes(self) -> int | None:
        """`memory_per_worker` in bytes."""
        return None if self.memory_per_worker is None else int(self.memory_per_worker * (1 << 30))

    @property
    def min_workers(self) -> int:
        """Fewest workers the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class PhaseLimits(Section):
    """Seconds that a rank may spend in a phase before it counts as hung."""

    start_s: Annotated[float, Field(gt=0)] = 600.0
    """From the group's start to the rank's first word."""
    load_s: Annotated[float, Field(gt=0)] | None = None
    """Loading the model and the checkpoint. Null, here and below, means ten times the longest so far and at least ten
    minutes; an hour or two before there was one."""
    data_s: Annotated[float, Field(gt=0)] | None = None
    """Waiting for a token shard that is not there yet, in `data.preparation: stream`."""
    first_step_s: Annotated[float, Field(gt=0)] | None = None
    """The first step, which compiles and allocates."""
    step_s: Annotated[float, Field(gt=0)] | None = None
    """A step. Null: three median steps and ten seconds."""
    evaluate_s: Annotated[float, Field(gt=0)] | None = None
    """An evaluation."""
    save_s: Annotated[float, Field(gt=0)] | None = None
    """Writing slices."""
    drain_s: Annotated[float, Field(gt=0)] = 3600.0
    """Waiting for the last commit."""
    silence_s: Annotated[float, Field(gt=0)] = 60.0
    """In any phase: without a sign of life from the rank's supervisor, which gives one several times a second. A
    supervisor that gets no answer for so long, and does not reach the head either, ends itself and its rank."""


class FailureConfig(Section):
    """Sets what happens after a failure."""

    max_restarts: Annotated[int, Field(ge=0)] = 20
    """Restarts after a crash or a hang before the run gives up. Errors of the user or of the data are never retried."""
    max_node_losses: Annotated[int, Field(ge=0)] = 1000
    """Restarts after the loss of a machine. A machine that gives notice costs none of these."""
    max_out_of_memory: Annotated[int, Field(ge=0)] = 2
    """Restarts after a rank ran out of memory: seldom a passing thing."""
    bad_numbers: Literal["fail", "rollback", "skip_batch"] = "fail"
    """After a loss or gradient norm that is not finite, or a spike: end the run; go back to the last checkpoint and
    try again, which cures a passing fault of the hardware; or go back and leave out the update of that step."""
    max_bad_numbers: Annotated[int, Field(ge=1)] = 3
    """Roll-backs or skipped steps before the run gives up."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss of more than so many times the median of the last 50 is a spike. Null: none is."""
    max_same_step: Annotated[int, Field(ge=1)] = 3
    """Failures in a row without a new step after which the run gives up."""
    backoff_s: Annotated[float, Field(ge=0)] = 2.0
    """Wait before a second restart at the same step; doubles up to a minute. The first restart does not wait."""
    limits: PhaseLimits = PhaseLimits()
    """When a rank counts as hung."""

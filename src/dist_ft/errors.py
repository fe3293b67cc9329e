"""The error tree. Owns what went wrong and whether a retry can help; owns no policy.

Every class survives pickling and Ray, and travels between processes as `to_dict()` / `from_dict()`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DistFtError(Exception):
    """Base of every error that dist-ft raises on purpose."""

    retryable: ClassVar[bool] = False
    """Whether a new attempt with the same input can succeed; failure policies read it."""
    exit_code: ClassVar[int] = 1

    def to_dict(self) -> dict[str, str]:
        """Return `{type, message}`, the form in which errors cross process borders."""
        return {"type": type(self).__name__, "message": str(self)}


class UserError(DistFtError, ValueError):
    """Something the user can fix: nothing was started, nothing was changed."""

    exit_code = 2


class ConfigError(UserError):
    """A key, value, type or combination in the run config."""


class UsageError(UserError):
    """A command that cannot apply, such as an existing run directory without `--resume`."""


class ModelError(UserError):
    """An unknown or unusable model, tokenizer or chat template."""


class DataError(UserError):
    """A file, line or row of the data that cannot be used."""


class CapacityError(UserError):
    """More workers than the cluster could ever hold."""


class HubUnreachableError(DistFtError):
    """A hub that breaks off, or does not answer a machine that is to join."""

    retryable = True


class DataUnavailableError(DistFtError):
    """Prepared data that cannot be fetched, or is not ready in time."""

    retryable = True


class CheckpointError(DistFtError):
    """A checkpoint that is incomplete, damaged or made for something else."""


class ExportError(DistFtError):
    """An exported model that failed its checks."""


class DivergedError(DistFtError):
    """A loss or gradient norm that is not finite, or a spike; `failure.bad_numbers` says what follows.

    Attributes:
        step: The step that gave it, if known.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class StaleAttemptError(DistFtError):
    """A message from an attempt that is no longer the current one."""


class NotAllowedError(DistFtError):
    """A call to the coordinator by somebody who is no part of the run."""


class WorkerCrashError(DistFtError):
    """A rank process died or raised something unforeseen."""

    retryable = True


class NodeLostError(DistFtError):
    """A machine of the cluster that went away, with its workers."""

    retryable = True


class OutOfMemoryError(DistFtError):
    """A rank that asked for more memory than there is, or that the system ended for it."""

    retryable = True


class StorageError(DistFtError):
    """Files that cannot be written or read: a full disk, a store that refuses or does not answer."""


class CoordinatorLostError(DistFtError):
    """The coordinator has died, or was started again and knows nothing of the run."""

    retryable = True


class CutOffError(DistFtError):
    """This machine does not reach the head of the cluster any more."""

    retryable = True


class StalledError(DistFtError):
    """A rank that made no progress within the limit of its phase."""

    retryable = True


class StartTimeoutError(DistFtError):
    """The cluster did not offer the workers within `cluster.start_timeout_s`."""

    retryable = True


def _classes() -> dict[str, type[DistFtError]]:
    found: dict[str, type[DistFtError]] = {}
    pending: list[type[DistFtError]] = [DistFtError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found


_NO_MEMORY = (
    "you tried to allocate",  # torch's CPU allocator, in each of its wordings
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
)


def from_exception(error: BaseException) -> dict[str, str]:
    """Return the wire form of any exception; foreign ones become a `WorkerCrashError`."""
    if isinstance(error, DistFtError):
        return error.to_dict()
    name = type(error).__name__
    # By name and wording: this module imports no torch.
    no_memory = name in ("MemoryError", "OutOfMemoryError") or any(sign in str(error) for sign in _NO_MEMORY)
    kind = OutOfMemoryError if no_memory else WorkerCrashError
    return {"type": kind.__name__, "message": f"{name}: {error}"}


def from_dict(data: dict[str, Any]) -> DistFtError:
    """Rebuilds an error from its wire form."""
    return _classes().get(str(data.get("type")), WorkerCrashError)(str(data.get("message")))

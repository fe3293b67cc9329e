"""The error tree: pickles, travels as JSON, and says what a retry or a user can do."""

from __future__ import annotations

import json
import pickle

import pytest

from dist_ft import errors
from dist_ft.errors import DistFtError, UserError, from_dict, from_exception


def tree(cls: type[DistFtError] = DistFtError) -> list[type[DistFtError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


ALL = [cls for cls in tree() if cls.__module__ == errors.__name__]
MESSAGE = "data.seq_len=4096 is too long\nzweite Zeile: ü"


def test_names_are_unique() -> None:
    assert len({cls.__name__ for cls in ALL}) == len(ALL) >= 12


@pytest.mark.parametrize("cls", ALL)
def test_an_error_survives_pickling(cls: type[DistFtError]) -> None:
    back = pickle.loads(pickle.dumps(cls(MESSAGE)))
    assert type(back) is cls
    assert str(back) == MESSAGE


@pytest.mark.parametrize("cls", ALL)
def test_an_error_survives_the_wire(cls: type[DistFtError]) -> None:
    back = from_dict(json.loads(json.dumps(from_exception(cls(MESSAGE)))))
    assert type(back) is cls
    assert str(back) == MESSAGE
    assert (back.retryable, back.exit_code) == (cls.retryable, cls.exit_code)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("boom"), SystemExit(3), ValueError("bad\nvalue")])
def test_a_foreign_error_is_a_crash_that_names_its_type(error: BaseException) -> None:
    back = from_dict(from_exception(error))
    assert type(back) is errors.WorkerCrashError
    assert str(back) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "data",
    [{}, {"type": "NoSuchError", "message": "m"}, {"type": None}, {"type": "ValueError", "message": "m"}],
)
def test_an_unknown_type_is_a_crash(data: dict[str, str]) -> None:
    assert type(from_dict(data)) is errors.WorkerCrashError


@pytest.mark.parametrize("cls", ALL)
def test_what_a_user_can_fix_exits_2_and_is_never_retried(cls: type[DistFtError]) -> None:
    is_users = issubclass(cls, UserError)
    assert cls.exit_code == (2 if is_users else 1)
    assert issubclass(cls, ValueError) == is_users
    assert not (is_users and cls.retryable)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_want_of_memory_is_told_apart(error: BaseException) -> None:
    assert type(from_dict(from_exception(error))) is errors.OutOfMemoryError


@pytest.mark.parametrize(
    "message", ["CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED"]
)
def test_other_errors_of_a_device_are_crashes(message: str) -> None:
    assert type(from_dict(from_exception(RuntimeError(message)))) is errors.WorkerCrashError


def test_only_what_may_pass_is_retried() -> None:
    assert {cls.__name__ for cls in ALL if cls.retryable} == {
        "CoordinatorLostError",
        "CutOffError",
        "DataUnavailableError",
        "HubUnreachableError",
        "NodeLostError",
        "OutOfMemoryError",
        "StalledError",
        "StartTimeoutError",
        "WorkerCrashError",
    }

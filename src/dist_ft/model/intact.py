"""Checks that the files of a model directory are whole, from their sizes and headers alone. Torch-free.

What the files say together (names, shapes) is left to `base.check_weights`, which asks transformers itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dist_ft.errors import ModelError
from dist_ft.file_kinds import MAX_POINTER_BYTES, describe_pointer
from dist_ft.printable import excerpt

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model directory that are read; other files may be anything."""
_LENGTH_BYTES = 8


def check_present(directory: Path, key: str) -> None:
    """Check that the files of a model are there, and not only pointers to them.

    Args:
        directory: Directory of the model or adapter.
        key: Config key and value that name it, for the message.

    Raises:
        ModelError: A file is a pointer, a link to nothing, or cannot be looked at.
    """
    for path in sorted(path for pattern in _READ for path in directory.glob(pattern)):
        try:
            pointer = describe_pointer(path.read_bytes()) if path.stat().st_size <= MAX_POINTER_BYTES else None
        except FileNotFoundError as error:
            raise ModelError(f"{key}: {path} is a link to {path.readlink()}, which does not exist") from error
        except OSError as error:
            raise ModelError(f"{key}: {path} cannot be read: {error.strerror}") from error
        if pointer:
            raise ModelError(f"{key}: {path} is {pointer}")


def check_files(directory: Path, key: str) -> None:
    """Check that the weights which the directory promises are there, and that each file of them is whole.

    Args:
        directory: Directory of the model.
        key: Config key and value that name it, for the message.

    Raises:
        ModelError: A file is missing, cut short, or no safetensors file.
    """
    check_present(directory, key)
    for path in _weight_files(directory, key):
        check_weight_file(path, key)


def weight_file_names(directory: Path) -> list[str]:
    """Return the files that transformers reads: the whole one, or those of the index. Others are not the model.

    Raises:
        ValueError: The index is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        return []
    found = json.loads(index.read_text(encoding="utf-8"))
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("it has no weight_map of tensors to files")
    return sorted(set(names.values()))


def check_weight_file(path: Path, key: str) -> None:
    """Check the header of a safetensors file against its size. Reads the header only.

    Raises:
        ModelError: It is cut short, longer than it says, or no safetensors file.
    """
    try:
        with safe_open(str(path), framework="np"):
            return
    except (SafetensorError, OSError) as error:
        found = path.stat().st_size
        expected = _size_by_header(path)
        if expected is None:
            with path.open("rb") as file:
                start = excerpt(file.read(40).decode("utf-8", "backslashreplace"))
            problem = f"is no safetensors file ({error}; it begins with {start})"
        elif found < expected:
            problem = f"is cut short: it has {found:,} of {expected:,} bytes"
        else:
            problem = f"is damaged: {error}"
        raise ModelError(f"{key}: {path} {problem}; fetch it again") from error


def _weight_files(directory: Path, key: str) -> list[Path]:
    """Return the weight files.

    Raises:
        ModelError: One is missing, or the index is damaged.
    """
    try:
        names = weight_file_names(directory)
    except ValueError as error:
        raise ModelError(f"{key}: {directory / INDEX} is damaged: {error}; fetch it again") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{key}: {INDEX} in {directory} names {len(names)} files, of which {len(missing)} are missing, the first "
            f"is {missing[0]}; fetch the rest"
        )
    return [directory / name for name in names]


def _size_by_header(path: Path) -> int | None:
    """Return the size that a safetensors file should have by its header; None if it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return _LENGTH_BYTES + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None

"""Finds the files of a source: one file, a folder of files, or a Hugging Face data set by path or by id.

The `datasets` library says which files make up a configuration and a split, as a data set's card or the names of its
files tell; reading them is `files.py`'s, so a data set reads the same by path and by id. No code of a data set is
ever run: the library has no support for scripts left. What an id names is kept in the hub's cache, a folder a commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_ft.config.rules import is_hub_id
from dist_ft.config.schema import RowSource
from dist_ft.errors import DataError, excerpt, printable
from dist_ft.stream.files import DataFile

_SPLIT_NAME = re.compile(
    r"(^|[-._ ])(train|training|test|testing|eval|evaluation|valid|validation|val|dev)([-._ 0-9]|$)"
)
"""What `datasets` takes for the name of a split in the name of a file."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_TOUCH_S = 10.0
_ACCESS = "check its name, split and revision, and HF_TOKEN if it is private or gated"
_REMOTE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<commit>[^/]+)/(?P<path>.+)")


def find_files(source: RowSource) -> list[DataFile]:
    """Returns the files of a source, in the order in which they are read.

    Raises:
        DataError: There are none, they are of several kinds, or a hub id can be neither fetched nor found in the cache.
    """
    path = Path(source.source).expanduser()
    if path.is_dir():
        files = _dataset_files(path, source) if _is_dataset(path, source) else _folder_files(path)
    elif path.exists() or not is_hub_id(source.source):
        files = [path]
    else:
        files = list(_hub_files(source.source, source.name, source.split, source.revision))
    _check_shards(source, files)
    found = [DataFile.at(file) for file in files]
    if kinds := sorted({file.kind for file in found[1:]} - {found[0].kind}):
        raise DataError(
            f"{printable(source.source)} holds {found[0].kind} and {', '.join(kinds)} files; "
            "keep one kind in a folder, or name the files as sources of their own"
        )
    return found


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise DataError(f"{printable(str(folder))} holds no files; name a data file or a folder of them")
    return files


def _is_dataset(folder: Path, source: RowSource) -> bool:
    """Whether a folder is laid out like a data set of the hub; else every file of it is read."""
    if source.split or source.name or (folder / "README.md").is_file() or (folder / "data").is_dir():
        return True
    return any(_SPLIT_NAME.search(path.name.lower()) for path in folder.iterdir() if not path.name.startswith("."))


def _dataset_files(folder: Path, source: RowSource) -> list[Path]:
    names = _split_files(str(folder), source, {})
    root = str(folder.resolve())
    # Only as text: the files of a snapshot in the hub's cache are links out of it.
    outside = [name for name in names if not os.path.normpath(name).startswith(root + os.sep)]
    if outside:
        raise DataError(
            f"{printable(source.source)}: its card names {excerpt(outside[0])}, which lies outside of it; "
            "mend README.md, or name the files as sources"
        )
    return [Path(name) for name in names]


@lru_cache(maxsize=64)
def _hub_files(source_id: str, name: str | None, split: str | None, revision: str | None) -> tuple[Path, ...]:
    """Fetches the files of a split into the hub's cache; without a hub, looks for them there.

    Once a process, so that hash and rows are those of one commit, also when a branch moves meanwhile.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    source = RowSource(source=source_id, name=name, split=split, revision=revision)
    try:
        _touch_hub()
        return tuple(_fetch(source, address) for address in _split_files(source_id, source, {"revision": revision}))
    except HfHubHTTPError as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{source_id}: the hub refuses: {said}; {_ACCESS}") from error
    except (OSError, HTTPError):
        pass  # no hub; perhaps it was fetched before
    try:
        folder = huggingface_hub.snapshot_download(
            source_id, repo_type="dataset", revision=revision, local_files_only=True
        )
    except LocalEntryNotFoundError as error:
        raise DataError(_not_found(source)) from error
    return tuple(_dataset_files(Path(folder), source))


def _touch_hub() -> None:
    """Finds out in seconds that there is no hub; the libraries try again and again for half a minute.

    Raises:
        OSError, HTTPError: The reason; `HF_HUB_OFFLINE` is one.
    """
    import huggingface_hub
    from huggingface_hub.constants import ENDPOINT

    huggingface_hub.get_session().head(ENDPOINT, timeout=_TOUCH_S)


def _split_files(name: str, source: RowSource, arguments: dict[str, Any]) -> Sequence[str]:
    """Returns paths or `hf://` addresses of the files of a split.

    Raises:
        ConnectionError: The hub cannot be reached.
    """
    import datasets

    shown = printable(source.source)
    try:
        files = datasets.load_dataset_builder(name, source.name, **arguments).config.data_files
    except (FileNotFoundError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{shown} is no data set that can be read: {printable(said)}; {_ACCESS}") from error
    if files is None:  # the library found its own copy, from which nobody can tell a commit
        raise ConnectionError(f"{shown} cannot be fetched")
    split = source.split or "train"
    if split not in files:
        raise DataError(f"{shown} has no split {split!r}, but {sorted(map(str, files))}; set split to one of them")
    return [str(file) for file in files[split]]


def _fetch(source: RowSource, address: str) -> Path:
    import huggingface_hub

    match = _REMOTE.fullmatch(address)
    if match is None:
        raise DataError(f"{source.source}: its card names {excerpt(address)}, which lies outside of it")
    return Path(
        huggingface_hub.hf_hub_download(match["id"], match["path"], repo_type="dataset", revision=match["commit"])
    )


def _not_found(source: RowSource) -> str:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    is_offline = huggingface_hub.is_offline_mode()
    reason = "HF_HUB_OFFLINE is set" if is_offline else "the hub cannot be reached (HF_HUB_OFFLINE is not set)"
    return (
        f"{source.source} is no path here and not wholly in the cache {HF_HUB_CACHE}, and {reason}; fetch it with "
        f"`hf download --repo-type dataset {source.source}` where there is a network, or name a local directory"
    )


def _check_shards(source: RowSource, files: Sequence[Path]) -> None:
    """Refuses a data set of which a shard is missing: its name says how many there are."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.name):
            numbers.setdefault((file.name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (stem, count), found in numbers.items():
        if len(files) > 1 and (missing := sorted(set(range(count)) - found)):
            raise DataError(
                f"{printable(source.source)}: {printable(stem)} has {len(found)} of {count} shards, "
                f"number {missing[0]} is missing; fetch the rest"
            )

"""Finds the files of a source that is a file, pattern, folder, or Hugging Face data set, but not a URL.

The `datasets` library finds the files of a configuration and split from the data set's card or its file names.
`readers.py` reads them, so a data set reads the same by path and by id. Code of a data set is never run, because the
library no longer supports scripts. Files of a hub id are kept in the hub's cache, one folder per commit.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash

from dist_ft.config.data_sections import RowSource
from dist_ft.config.paths import is_hub_id, is_pattern
from dist_ft.errors import DataError
from dist_ft.printable import excerpt, printable
from dist_ft.storage.publish import read_json, write_json
from dist_ft.storage.remote import without_scheme

_SPLIT_NAME = re.compile(
    r"(^|[-._ ])(train|training|test|testing|eval|evaluation|valid|validation|val|dev)([-._ 0-9]|$)"
)
"""File names in which `datasets` recognises the name of a split."""
_TOUCH_S = 10.0
_ACCESS = "check its name, split and revision, and HF_TOKEN if it is private or gated"
_REMOTE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<commit>[^/]+)/(?P<path>.+)")


def find_files(source: RowSource) -> list[Path]:
    """Return the files of a source that is a path or a hub id, in the order in which they are read.

    Raises:
        DataError: There are no files, or a hub id can be neither fetched nor found in the cache.
    """
    try:
        return _find(source)
    except OSError as error:
        raise DataError(f"{printable(source.source)} cannot be read: {error.strerror or error}") from error


def _find(source: RowSource) -> list[Path]:
    path = Path(without_scheme(source.source)).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            path = _saved_split(path, source)
        if (path / "state.json").is_file():
            return _saved_files(path)
        return _dataset_files(path, source) if _is_dataset(path, source) else _folder_files(path)
    if path.exists():
        return [path]
    if is_pattern(str(path)):
        return _matching_files(path)
    if not is_hub_id(source.source):
        return [path]
    return list(_hub_files(source.source, source.name, source.split, source.revision))


def _saved_split(folder: Path, source: RowSource) -> Path:
    """Return the folder of a split that `DatasetDict.save_to_disk` has written."""
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    split = source.split or "train"
    if split not in splits:
        raise DataError(_no_split(source, splits))
    return folder / split


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a data set that `Dataset.save_to_disk` has written, in its order."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{printable(str(folder))}/state.json is damaged; save the data set again") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise DataError(f"{printable(str(folder))}/state.json names {excerpt(names)}, expected plain file names")
    return [folder / name for name in names]


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise DataError(f"{printable(str(folder))} holds no files; name a data file or a folder of them")
    return files


def _matching_files(pattern: Path) -> list[Path]:
    names = glob.iglob(str(pattern), recursive=True)  # noqa: PTH207 (it leaves hidden files out, as a shell does)
    files = sorted(path for name in names if (path := Path(name)).is_file())
    if not files:
        raise DataError(f"{printable(str(pattern))} matches no files (looked in {Path.cwd()}); check the pattern")
    return files


def _is_dataset(folder: Path, source: RowSource) -> bool:
    """Return whether a folder is laid out like a data set of the hub; otherwise all its files are read."""
    if source.split or source.name or (folder / "README.md").is_file() or (folder / "data").is_dir():
        return True
    return any(_SPLIT_NAME.search(path.name.lower()) for path in folder.iterdir() if not path.name.startswith("."))


def _dataset_files(folder: Path, source: RowSource) -> list[Path]:
    names = _split_files(str(folder), source)
    root = str(folder.resolve())
    # Compared as text, because the files of a snapshot in the hub's cache are links that lead out of it.
    outside = [name for name in names if not os.path.normpath(name).startswith(root + os.sep)]
    if outside:
        raise DataError(
            f"{printable(source.source)}: its card names {excerpt(outside[0])}, which lies outside of it; "
            "mend README.md, or name the files as sources"
        )
    return [Path(name) for name in names]


@lru_cache(maxsize=64)
def _hub_files(source_id: str, name: str | None, split: str | None, revision: str | None) -> tuple[Path, ...]:
    """Fetch the files of a split into the hub's cache; offline, looks for them there.

    Done once per process, so that hash and rows are of one commit even if a branch moves meanwhile.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    source = RowSource(source=source_id, name=name, split=split, revision=revision)
    try:
        _touch_hub()
        addresses = _split_files(source_id, source, revision)
        files = tuple(_fetch(source, address) for address in addresses)
        write_json(_record_path(source), {"files": addresses})
        return files
    except HfHubHTTPError as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{source_id}: the hub refuses: {said}; {_ACCESS}") from error
    except (OSError, HTTPError):
        pass  # the hub is out of reach; the files may have been fetched before
    try:
        if _record_path(source).exists():
            return tuple(
                _fetch(source, address, is_offline=True) for address in read_json(_record_path(source))["files"]
            )
        folder = huggingface_hub.snapshot_download(
            source_id, repo_type="dataset", revision=revision, local_files_only=True
        )
        return tuple(_dataset_files(Path(folder), source))
    except (LocalEntryNotFoundError, DataError) as error:  # the cache has nothing, or only a part without the split
        raise DataError(_not_found(source)) from error


def _record_path(source: RowSource) -> Path:
    """Return the path of a record of a source's commit and files: a partial data set must not pass for the whole."""
    from huggingface_hub.constants import HF_HOME

    asked = f"{[source.source, source.name, source.split or 'train', source.revision]}"
    return Path(HF_HOME) / "dist-ft" / f"{xxhash.xxh3_128_hexdigest(asked.encode())}.json"


def _touch_hub() -> None:
    """Check within seconds that the hub answers; the libraries would retry for half a minute.

    Raises:
        OSError, HTTPError: The hub is out of reach, or `HF_HUB_OFFLINE` is set.
    """
    import huggingface_hub
    from huggingface_hub.constants import ENDPOINT

    huggingface_hub.get_session().head(ENDPOINT, timeout=_TOUCH_S)


def _split_files(name: str, source: RowSource, revision: str | None = None) -> Sequence[str]:
    """Return paths or `hf://` addresses of the files of a split.

    Raises:
        OSError, HTTPError: The hub cannot be reached.
    """
    import datasets
    from huggingface_hub.errors import HTTPError

    shown = printable(source.source)
    try:
        # The library requires a folder for its own copies, but makes none here.
        with TemporaryDirectory() as scratch:
            builder = datasets.load_dataset_builder(name, source.name, cache_dir=scratch, revision=revision)
        files = builder.config.data_files
    except Exception as error:  # the card is input from outside, for which the library can raise anything
        if isinstance(error, OSError | HTTPError) and not isinstance(error, FileNotFoundError):
            raise
        said = printable(" ".join(str(error).split()))[:200]
        raise DataError(f"{shown} is no data set that can be read: {said}; {_ACCESS}") from error
    split = source.split or "train"
    if split not in files:
        raise DataError(_no_split(source, sorted(map(str, files))))
    return [str(file) for file in files[split]]


def _fetch(source: RowSource, address: str, is_offline: bool = False) -> Path:
    """Return the path of a file in the hub's cache."""
    import huggingface_hub

    match = _REMOTE.fullmatch(address)
    if match is None:
        raise DataError(f"{source.source}: its card names {excerpt(address)}, which lies outside of it")
    found = huggingface_hub.hf_hub_download(
        match["id"], match["path"], repo_type="dataset", revision=match["commit"], local_files_only=is_offline
    )
    return Path(found)


def _no_split(source: RowSource, splits: Sequence[str]) -> str:
    known = ", ".join(map(excerpt, splits))
    return f"{printable(source.source)} has no split {source.split or 'train'!r}, but {known}; set split to one of them"


def _not_found(source: RowSource) -> str:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    is_offline = huggingface_hub.is_offline_mode()
    reason = "HF_HUB_OFFLINE is set" if is_offline else "the hub cannot be reached (HF_HUB_OFFLINE is not set)"
    return (
        f"{source.source} is no path here and not wholly in the cache {HF_HUB_CACHE}, and {reason}; fetch it with "
        f"`hf download --repo-type dataset {source.source}` where there is a network, or name a local directory"
    )

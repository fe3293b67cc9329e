"""Holds: files in a run directory that keep a checkpoint from being deleted.

A tag is a hold without an end that a person gave a name. A reader, such as an export, holds what it reads for a few
hours, and gives it back when it is done.

Holder and deleter each write first and look afterwards: the holder writes its hold and then looks for a mark of
deletion, the deleter writes its mark and then looks for holds. So at least one of them sees the other, whichever dies
half way, and neither needs a lock. A mark that a killed deleter left is decided anew by the next clean-up.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from dist_ft.checkpoint.manifest import MANIFEST
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.layout import FORMAT_VERSION
from dist_ft.storage.store import Store
from dist_ft.typed_json import from_json

HOLDS = "holds"
"""Folder of the holds in a run directory."""
DOOMED = "doomed"
"""File in a checkpoint's folder that says that it is about to be deleted."""
_READER_LIMIT_S = 2 * 3600.0
"""A reader that was killed holds its checkpoint for so long; at 100 MB/s an export reads 720 GB meanwhile."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAG_PREFIX = "tag-"


@dataclass(frozen=True)
class Hold:
    """A checkpoint that must stay.

    Attributes:
        directory: Folder of the checkpoint in the run directory.
        until: Unix time at which the hold ends; None if it does not.
    """

    directory: str
    until: float | None


def read_holds(store: Store, now: float | None = None) -> dict[str, Hold]:
    """Return the holds that have not ended, by the name of their file.

    Raises:
        CheckpointError: A hold cannot be read; what it holds would be a guess.
    """
    now = time.time() if now is None else now
    found = {}
    for name in store.names(HOLDS):
        try:
            raw = json.loads(store.read(name))
            if raw.pop("format_version") != FORMAT_VERSION:
                raise CheckpointError(f"{name} is not of format {FORMAT_VERSION}; use the dist-ft that wrote it")
            hold = from_json(Hold, raw)
        except FileNotFoundError:
            continue  # given back at this moment
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{name} is not a hold: {error}; remove it if nobody needs it") from error
        if hold.until is None or hold.until > now:
            found[PurePosixPath(name).stem] = hold
    return found


def read_tags(store: Store) -> dict[str, str]:
    """Return the checkpoint folder of each tag of a run."""
    held = read_holds(store).items()
    return {name.removeprefix(_TAG_PREFIX): hold.directory for name, hold in held if name.startswith(_TAG_PREFIX)}


def add_tag(store: Store, tag: str, directory: str, has_ended: bool) -> None:
    """Give a checkpoint a name; it stays until the name is removed.

    Args:
        store: The run directory.
        tag: The name.
        directory: Folder of the checkpoint.
        has_ended: Whether the run has ended, so that nobody follows a mark of deletion any more.

    Raises:
        UsageError: The name cannot be a file's, is given to another checkpoint, or the checkpoint is being deleted.
    """
    if not _TAG.fullmatch(tag):
        raise UsageError(f"the tag {tag!r} is no name: letters, digits, `.`, `_` and `-`, at most 100")
    known = read_tags(store).get(tag)
    if known == directory:
        return
    if known is not None or not _hold(store, f"{_TAG_PREFIX}{tag}", Hold(directory, None), has_ended):
        what = f"is the tag of {known} already" if known else f"cannot be given: {directory} is being deleted"
        raise UsageError(f"{tag} {what}; remove the tag with --remove, or choose another one or another step")


def remove_tag(store: Store, tag: str) -> None:
    """Remove a tag.

    Raises:
        UsageError: The run has no such tag.
    """
    known = read_tags(store)
    if tag not in known:
        raise UsageError(f"there is no tag {tag}; there are: {', '.join(sorted(known)) or 'none'}")
    store.delete(f"{HOLDS}/{_TAG_PREFIX}{tag}.json")


@contextlib.contextmanager
def reading(store: Store, directory: str) -> Iterator[None]:
    """Hold a checkpoint while the block reads it. A run that cannot be written to is read without a hold.

    Raises:
        CheckpointError: The checkpoint is being deleted.
    """
    name = f"reader-{uuid.uuid4().hex[:12]}"
    is_held: bool | None = None
    with contextlib.suppress(OSError):  # a directory that this user may only read, or a full disk
        is_held = _hold(store, name, Hold(directory, time.time() + _READER_LIMIT_S), has_ended=False)
    if is_held is False:
        raise CheckpointError(f"{directory} is gone or about to be deleted; choose a newer checkpoint")
    try:
        yield
    finally:
        if is_held:
            with contextlib.suppress(OSError):  # it ends by itself
                store.delete(f"{HOLDS}/{name}.json")


def _hold(store: Store, name: str, hold: Hold, has_ended: bool) -> bool:
    """Write a hold; return False and take it back if the checkpoint is being deleted."""
    path = f"{HOLDS}/{name}.json"
    data = json.dumps({"format_version": FORMAT_VERSION, **asdict(hold)}).encode()
    if not store.create_exclusive(path, data):
        return False
    names = store.names(hold.directory)
    is_there = f"{hold.directory}/{MANIFEST}" in names
    if is_there and (has_ended or f"{hold.directory}/{DOOMED}" not in names):
        return True
    store.delete(path)
    return False

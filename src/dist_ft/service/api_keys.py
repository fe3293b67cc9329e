"""Keys of the API: made, looked up and removed. Only a hash is stored; a key is shown once, when it is made."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sql

from dist_ft.errors import UsageError
from dist_ft.service.index import KEYS, Index
from dist_ft.service.wire import new_id

Role = Literal["admin", "member"]
ROLES: tuple[Role, ...] = ("admin", "member")
DEFAULT_PROJECT = "default"
_FROM_FILE = "key_from_file"
_OWN_KEY = re.compile(r"[A-Za-z0-9_-]{32,200}")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request.

    Attributes:
        key_id: Id of the key.
        project: Project whose objects it sees.
        role: `admin` or `member`.
    """

    key_id: str
    project: str
    role: str

    @property
    def organization(self) -> str:
        """Name of the organization that its project is for OpenAI's clients."""
        return f"org-{self.project}"


@dataclass(frozen=True)
class KeyInfo:
    """What is kept of a key, without the key."""

    id: str
    shown: str
    name: str
    project: str
    role: str
    created_at: int
    expires_at: int | None


ANYBODY = Caller("key_none", DEFAULT_PROJECT, "admin")
"""The caller of a server without keys, which answers on loopback only."""


def add_key(index: Index, role: str, project: str, name: str, days: float | None) -> str:
    """Make a key and return it; nobody can show it again.

    Raises:
        UsageError: The role or the project's name is not possible.
    """
    if role not in ROLES:
        raise UsageError(f"--role {role} is none of {', '.join(ROLES)}")
    if not _PROJECT.fullmatch(project):
        raise UsageError(f"--project {project}: expected 1 to 63 letters, digits, '-' and '_'")
    key = f"sk-dft-{secrets.token_urlsafe(32)}"
    now = int(time.time())
    values = {
        "hash": _hash(key), "id": new_id("key_", 16), "shown": f"{key[:10]}…{key[-2:]}", "name": name[:100],
        "project": project, "role": role, "created_at": now,
        "expires_at": None if days is None else now + int(days * 86400),
    }  # fmt: skip
    with index.writing() as connection:
        connection.execute(sql.insert(KEYS).values(values))
    return key


def keep_key_of(index: Index, path: Path) -> None:
    """Keep the key in a file as an administrator's, in place of the one that the file held before.

    So a service in a container has a key from the first start on, and still has it when the index was deleted.

    Raises:
        UsageError: The file cannot be read, or holds no key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--admin-key-file {path}: {error}") from error
    if not _OWN_KEY.fullmatch(key):
        raise UsageError(
            f"--admin-key-file {path}: expected 32 to 200 letters, digits, '-' and '_' (openssl rand -hex 32), found "
            f"{len(key)} characters"
        )
    values = {
        "hash": _hash(key), "id": _FROM_FILE, "shown": hidden(key), "name": "from --admin-key-file",
        "project": DEFAULT_PROJECT, "role": "admin", "created_at": int(time.time()), "expires_at": None,
    }  # fmt: skip
    with index.writing() as connection:
        connection.execute(sql.delete(KEYS).where((KEYS.c.id == _FROM_FILE) | (KEYS.c.hash == _hash(key))))
        connection.execute(sql.insert(KEYS).values(values))


def list_keys(index: Index) -> list[KeyInfo]:
    """Return all keys, the oldest first."""
    columns = [column for column in KEYS.c if column.name != "hash"]
    with index.reading() as connection:
        found = connection.execute(sql.select(*columns).order_by(KEYS.c.created_at))
        return [KeyInfo(**row._mapping) for row in found]


def remove_key(index: Index, key_id: str) -> None:
    """Remove a key.

    Raises:
        UsageError: There is none.
    """
    with index.writing() as connection:
        if connection.execute(sql.delete(KEYS).where(KEYS.c.id == key_id)).rowcount == 0:
            raise UsageError(f"{key_id}: there is no such key; `dist-ft api key ls` lists them")


def has_keys(index: Index) -> bool:
    """Return whether any key exists."""
    with index.reading() as connection:
        return connection.execute(sql.select(KEYS.c.id).limit(1)).first() is not None


def caller_with(index: Index, key: str) -> Caller | None:
    """Return who has a key; None for an unknown or expired one.

    The look-up is by hash: how long it takes says nothing about the key.
    """
    with index.reading() as connection:
        found = connection.execute(sql.select(KEYS).where(KEYS.c.hash == _hash(key))).first()
    if found is None or (found.expires_at is not None and found.expires_at <= time.time()):
        return None
    return Caller(found.id, found.project, found.role)


def hidden(key: str) -> str:
    """Return a key as a message may show it."""
    return f"{key[:5]}***{key[-2:]}" if len(key) >= 12 else "***"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()

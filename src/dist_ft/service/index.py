"""The database: an index over what lies in the store, and the home of keys, webhooks, retries and the lease.

Objects (files, uploads, jobs, models, webhook endpoints) are rows of one table with the object as JSON. Files and jobs
also lie in the store, and are put here again when the database is new. SQLite by default, PostgreSQL by URL.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError

from dist_ft.errors import UsageError
from dist_ft.service.wire import Object, bad_request

_META = sql.MetaData()
_SEQ = sql.BigInteger().with_variant(sql.Integer, "sqlite")  # only INTEGER counts by itself in SQLite
OBJECTS = sql.Table(
    "objects",
    _META,
    sql.Column("seq", _SEQ, primary_key=True, autoincrement=True),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("id", sql.String(200), nullable=False, unique=True),
    sql.Column("project", sql.String(64), nullable=False),
    sql.Column("label", sql.String(64), nullable=False),
    sql.Column("data", sql.Text, nullable=False),
    sql.Index("objects_in_order", "kind", "project", "seq"),
    sql.Index("objects_by_label", "kind", "label", "seq"),
    sqlite_autoincrement=True,
)
EVENTS = sql.Table(
    "events",
    _META,
    sql.Column("seq", _SEQ, primary_key=True, autoincrement=True),
    sql.Column("job", sql.String(64), nullable=False),
    sql.Column("id", sql.String(64), nullable=False, unique=True),
    sql.Column("data", sql.Text, nullable=False),
    sql.Index("events_in_order", "job", "seq"),
    sqlite_autoincrement=True,
)
KEYS = sql.Table(
    "keys",
    _META,
    sql.Column("hash", sql.String(64), primary_key=True),
    sql.Column("id", sql.String(32), nullable=False, unique=True),
    sql.Column("shown", sql.String(32), nullable=False),
    sql.Column("name", sql.String(100), nullable=False),
    sql.Column("project", sql.String(64), nullable=False),
    sql.Column("role", sql.String(16), nullable=False),
    sql.Column("created_at", sql.Integer, nullable=False),
    sql.Column("expires_at", sql.Integer),
)
ASKED = sql.Table(
    "asked",
    _META,
    sql.Column("mark", sql.String(160), primary_key=True),
    sql.Column("job", sql.String(64), nullable=False),
    sql.Column("body", sql.String(64), nullable=False),
    sql.Column("at", sql.Float, nullable=False),
)
LEASE = sql.Table(
    "lease",
    _META,
    sql.Column("name", sql.String(32), primary_key=True),
    sql.Column("holder", sql.String(64), nullable=False),
    sql.Column("until", sql.Float, nullable=False),
)


@dataclass(frozen=True)
class Row:
    """An object of the index: its project, its label (a file's purpose, a job's status), and the object itself."""

    id: str
    project: str
    label: str
    data: Object


class Index:
    """Reads and writes the database.

    Args:
        url: URL of the database, as SQLAlchemy writes it.

    Raises:
        UsageError: The URL is not understood.
    """

    def __init__(self, url: str) -> None:
        self._lock = threading.RLock()  # SQLite has one writer; a second one would wait in its busy loop
        self._begun: sql.Connection | None = None
        try:
            self._engine = sql.create_engine(url, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise UsageError(
                f"--database {url.split('@')[-1]}: {error}; expected sqlite:////PATH or postgresql+psycopg://… with "
                "`pip install psycopg`"
            ) from error
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _tune_sqlite)
        _META.create_all(self._engine)

    def is_empty(self) -> bool:
        """Return whether it lists nothing yet, so that it has to be filled from the store."""
        with self._engine.connect() as connection:
            return connection.execute(sql.select(OBJECTS.c.seq).limit(1)).first() is None

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """Yield a transaction; other writers of this process wait. Within another one it is a part of that."""
        with self._lock:
            if self._begun is not None:
                with self._begun.begin_nested():
                    yield self._begun
                return
            with self._engine.begin() as connection:
                self._begun = connection
                try:
                    yield connection
                finally:
                    self._begun = None

    @contextmanager
    def holding(self, object_id: str) -> Iterator[None]:
        """Keep every other process from changing an object; what is written meanwhile is seen at the end."""
        with self.writing() as connection:
            # Takes the row's lock in PostgreSQL and the one writer's place in SQLite.
            connection.execute(sql.update(OBJECTS).where(OBJECTS.c.id == object_id).values(label=OBJECTS.c.label))
            yield

    def put(self, kind: str, row: Row) -> None:
        """Add an object, or replace the one with its id."""
        values = {"kind": kind, "project": row.project, "label": row.label, "data": json.dumps(row.data)}
        with self.writing() as connection:
            done = connection.execute(sql.update(OBJECTS).where(OBJECTS.c.id == row.id).values(values))
            if done.rowcount == 0:
                connection.execute(sql.insert(OBJECTS).values(id=row.id, **values))

    def get(self, kind: str, object_id: str, project: str | None = None) -> Row | None:
        """Return an object; None if there is none, or it belongs to another project. No project: of any."""
        where = [OBJECTS.c.kind == kind, OBJECTS.c.id == object_id]
        if project is not None:
            where.append(OBJECTS.c.project == project)
        with self._engine.connect() as connection:
            found = connection.execute(sql.select(OBJECTS).where(*where)).first()
        return None if found is None else _row(found)

    def delete(self, kind: str, object_id: str) -> None:
        """Remove an object."""
        with self.writing() as connection:
            connection.execute(sql.delete(OBJECTS).where(OBJECTS.c.kind == kind, OBJECTS.c.id == object_id))

    def listed(
        self,
        kind: str,
        project: str,
        after: str | None,
        limit: int,
        label: str | None = None,
        is_ascending: bool = False,
    ) -> tuple[list[Row], bool]:
        """Return a page of objects, the newest first, and whether there are more.

        Raises:
            ApiError: There is no object `after`.
        """
        where = [OBJECTS.c.kind == kind, OBJECTS.c.project == project]
        if label is not None:
            where.append(OBJECTS.c.label == label)
        with self._engine.connect() as connection:
            if after is not None:
                own = (OBJECTS.c.kind == kind, OBJECTS.c.project == project, OBJECTS.c.id == after)
                seq = connection.execute(sql.select(OBJECTS.c.seq).where(*own)).scalar()
                where.append(_beyond(OBJECTS.c.seq, seq, after, is_ascending))
            order = OBJECTS.c.seq.asc() if is_ascending else OBJECTS.c.seq.desc()
            found = connection.execute(sql.select(OBJECTS).where(*where).order_by(order).limit(limit + 1)).all()
        return [_row(row) for row in found[:limit]], len(found) > limit

    def every(self, kind: str, labels: Sequence[str] | None = None, project: str | None = None) -> list[Row]:
        """Return all objects of a kind, of one project or of all, the oldest first."""
        where = [OBJECTS.c.kind == kind]
        if project is not None:
            where.append(OBJECTS.c.project == project)
        if labels is not None:
            where.append(OBJECTS.c.label.in_(labels))
        with self._engine.connect() as connection:
            return [_row(row) for row in connection.execute(sql.select(OBJECTS).where(*where).order_by(OBJECTS.c.seq))]

    def counts(self, kind: str) -> dict[str, int]:
        """Return how many objects of a kind have each label."""
        query = sql.select(OBJECTS.c.label, sql.func.count()).where(OBJECTS.c.kind == kind).group_by(OBJECTS.c.label)
        with self._engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def add_events(self, job: str, events: Iterable[Object]) -> None:
        """Add events of a job, the oldest first; those that are known already are left out."""
        for event in events:
            try:
                with self.writing() as connection:
                    values = {"job": job, "id": event["id"], "data": json.dumps(event)}
                    connection.execute(sql.insert(EVENTS).values(values))
            except IntegrityError:
                continue

    def has_event(self, event_id: str) -> bool:
        """Return whether an event is known."""
        with self._engine.connect() as connection:
            return connection.execute(sql.select(EVENTS.c.seq).where(EVENTS.c.id == event_id)).first() is not None

    def events(self, job: str, after: str | None, limit: int) -> tuple[list[Object], bool]:
        """Return a page of a job's events, the newest first, and whether there are more.

        Raises:
            ApiError: There is no event `after`.
        """
        where = [EVENTS.c.job == job]
        with self._engine.connect() as connection:
            if after is not None:
                own = (EVENTS.c.job == job, EVENTS.c.id == after)
                where.append(
                    _beyond(EVENTS.c.seq, connection.execute(sql.select(EVENTS.c.seq).where(*own)).scalar(), after)
                )
            query = sql.select(EVENTS.c.data).where(*where).order_by(EVENTS.c.seq.desc()).limit(limit + 1)
            found = [json.loads(data) for (data,) in connection.execute(query)]
        return found[:limit], len(found) > limit

    def job_asked_for(self, marks: Sequence[str], since: float) -> tuple[str, str] | None:
        """Return job and body hash of the newest request with one of these marks."""
        query = sql.select(ASKED.c.job, ASKED.c.body).where(ASKED.c.mark.in_(marks), ASKED.c.at >= since)
        with self._engine.connect() as connection:
            found = connection.execute(query.order_by(ASKED.c.at.desc())).first()
        return None if found is None else (found.job, found.body)

    def remember_asked(self, marks: Sequence[str], job: str, body: str) -> None:
        """Remember which job answered a request."""
        with self.writing() as connection:
            connection.execute(sql.delete(ASKED).where(ASKED.c.mark.in_(marks)))
            values = [{"mark": mark, "job": job, "body": body, "at": time.time()} for mark in marks]
            connection.execute(sql.insert(ASKED), values)

    def take_lease(self, name: str, holder: str, lasts_s: float) -> bool:
        """Take or renew a lease; return False while somebody else holds it."""
        now = time.time()
        mine = (LEASE.c.name == name) & ((LEASE.c.holder == holder) | (LEASE.c.until < now))
        values = {"holder": holder, "until": now + lasts_s}
        try:
            with self.writing() as connection:
                if connection.execute(sql.update(LEASE).where(mine).values(values)).rowcount:
                    return True
                connection.execute(sql.insert(LEASE).values(name=name, **values))
                return True
        except IntegrityError:
            return False

    def give_lease_back(self, name: str, holder: str) -> None:
        """Let the next holder begin at once."""
        with self.writing() as connection:
            connection.execute(sql.delete(LEASE).where(LEASE.c.name == name, LEASE.c.holder == holder))

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """Yield a connection for reads."""
        with self._engine.connect() as connection:
            yield connection


def _beyond(
    column: sql.Column[int], seq: int | None, after: str, is_ascending: bool = False
) -> sql.ColumnElement[bool]:
    if seq is None:
        raise bad_request(f"No such object: {after[:100]}", "after")
    return column > seq if is_ascending else column < seq


def _row(found: sql.Row[Any]) -> Row:
    return Row(found.id, found.project, found.label, json.loads(found.data))


def _tune_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()

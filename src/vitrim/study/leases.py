"""Who is at which run: leases in a database that several workers share, each kept alive by its worker's heartbeat.

A claim is a row that one worker inserts, keeps counting up, and deletes when it is through. One whose count has stood
still for the grace period is a dead worker's, and is taken over. Each worker times that by its own clock, so that the
clocks of different machines never meet.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from uuid import uuid4

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ..errors import UnknownNameError, VitrimError

GRACE = 120.0
"""Seconds without a sign of life after which a worker counts as dead."""
BEATS = 6
"""Signs of life in that time."""

_KINDS = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")
_PACKAGES = {
    "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient",
}  # fmt: skip
_TABLE = Table(
    "vitrim_leases",
    MetaData(),
    Column("study", String(32), primary_key=True),
    Column("run", String(255), primary_key=True),
    Column("worker", String(255), nullable=False),
    Column("beat", Integer, nullable=False),
)


class Leases:
    """The leases of one worker, and its view of those of the others.

    Args:
        url: of the database, as SQLAlchemy reads it.
        study: distinguishes the runs of this study from those of others in the same database.
        grace: seconds after which a worker that shows no sign of life counts as dead; the same for all workers.

    Raises:
        VitrimError: the database cannot be opened, or cannot be shared.
    """

    def __init__(self, url: str, study: str, grace: float = GRACE) -> None:
        self.study, self.grace = study, grace
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}
        try:
            place = make_url(url)
            if place.get_backend_name() == "sqlite" and place.database in (None, "", ":memory:"):
                raise VitrimError("a database in memory is no other worker's; write sqlite:///FILE")
            # Connections of the moment alone, since the processes that read images are forks of this one.
            self._engine = create_engine(place, poolclass=NullPool)
        except NoSuchModuleError:
            raise UnknownNameError("kind of database", place.drivername, _KINDS) from None
        except ArgumentError:  # The text is not repeated, because it may hold a password.
            raise VitrimError(
                "--database is no URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
            ) from None
        except ModuleNotFoundError as error:
            package = _PACKAGES.get(error.name or "", error.name)
            raise VitrimError(f"{place.drivername} needs a driver; run: pip install '{package}'") from None
        self._place = place.render_as_string(hide_password=True)
        try:
            with self._told():
                _TABLE.create(self._engine, checkfirst=True)
        except (VitrimError, IntegrityError):  # Another worker may have made it between look and deed.
            with self._told():
                _TABLE.create(self._engine, checkfirst=True)

    def acquire(self, run: str) -> bool:
        """Claim a run that nobody is at, or whose worker has died; False where a living worker is at it."""
        mine = (_TABLE.c.study == self.study) & (_TABLE.c.run == run)
        with self._told() as database:
            found = database.execute(select(_TABLE.c.worker, _TABLE.c.beat).where(mine)).first()
        if found is None:
            try:
                with self._told() as database:
                    database.execute(insert(_TABLE).values(study=self.study, run=run, worker=self.worker, beat=0))
            except IntegrityError:
                return False
            return True
        sign, now = (found[0], found[1]), time.monotonic()
        known, since = self._seen.setdefault(run, (sign, now))
        if known != sign:
            self._seen[run] = (sign, now)
        elif now - since >= self.grace:
            worker, beat = sign
            still = mine & (_TABLE.c.worker == worker) & (_TABLE.c.beat == beat)
            with self._told() as database:
                taken = database.execute(update(_TABLE).where(still).values(worker=self.worker, beat=beat + 1))
            return taken.rowcount == 1
        return False

    @contextmanager
    def held(self, run: str) -> Iterator[Event]:
        """Keep a claim alive while this is entered, then give it up; the event is set where another took it over."""
        over, lost = Event(), Event()
        thread = Thread(target=self._beat, args=(run, over, lost), daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            over.set()
            thread.join()
            with suppress(VitrimError), self._told() as database:  # Else the grace period ends it.
                database.execute(delete(_TABLE).where(self._own(run)))

    def _beat(self, run: str, over: Event, lost: Event) -> None:
        pause = self.grace / BEATS
        alive = time.monotonic()
        while not over.wait(pause):
            asked = time.monotonic()
            with suppress(VitrimError):  # A database that is away for a moment is asked again.
                with self._told() as database:
                    beat = update(_TABLE).where(self._own(run)).values(beat=_TABLE.c.beat + 1)
                    if not database.execute(beat).rowcount:
                        break
                alive = asked
            if time.monotonic() - alive > self.grace - pause:  # Before others may think this worker dead.
                break
        else:
            return
        lost.set()

    def _own(self, run: str):
        return (_TABLE.c.study == self.study) & (_TABLE.c.run == run) & (_TABLE.c.worker == self.worker)

    @contextmanager
    def _told(self) -> Iterator[Connection]:
        """One transaction; what goes wrong with the database is one line, without the password."""
        try:
            with self._engine.begin() as database:
                yield database
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise VitrimError(f"the database {self._place} cannot be used ({reason})") from None

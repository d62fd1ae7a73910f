"""Which worker trains which run: leases in a database that several workers share, each renewed by a heartbeat.

A lease is a row that a worker inserts, counts up while it works, and deletes when it has finished. A lease whose count
has not changed for the grace period belongs to a dead worker, and another may take it over; at once, where it was a
process of the same machine that has ended. Each worker measures that time with its own clock, so the clocks of
different machines need not agree.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TypeVar

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, delete, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ..errors import VitrimError
from .database_url import connect
from .lives import has_ended, name_of_worker

GRACE = 120.0
"""Seconds without a heartbeat after which a worker counts as dead."""
HEARTBEATS = 6
"""Heartbeats in that time."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
"""Pauses before a failed request is repeated; the last one from then on."""

T = TypeVar("T")

_TABLE = Table(
    "vitrim_leases",
    MetaData(),
    Column("study", String(32), primary_key=True),
    Column("run", String(255), primary_key=True),
    Column("worker", String(255), nullable=False),
    Column("beat", Integer, nullable=False),
)


class DatabaseAway(VitrimError):
    """A database that does not answer, which may pass."""


class Leases:
    """The leases of one worker, and its view of those of the others.

    Once the database has answered, an error counts as an outage: requests are repeated until the grace period is
    over, as heartbeats are.

    Args:
        url: of the database, as SQLAlchemy reads it.
        study: distinguishes the runs of this study from those of others in the same database.
        grace: seconds without a heartbeat after which a worker counts as dead; the same for all workers.
        report_outage: called once per outage with a line about it.

    Raises:
        VitrimError: the database cannot be opened, or cannot be shared.
    """

    def __init__(
        self, url: str, study: str, grace: float = GRACE, report_outage: Callable[[str], None] = lambda line: None
    ) -> None:
        self.study, self.grace, self.report_outage = study, grace, report_outage
        self.worker = name_of_worker()
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}
        self._engine = connect(url)
        self.place = self._engine.url.render_as_string(hide_password=True)
        try:
            self._create_table()
        except (VitrimError, IntegrityError):  # Another worker may have created it between the check and the creation.
            self._create_table()

    def acquire(self, run: str) -> bool:
        """Lease a run that no living worker holds; False where one does.

        Raises:
            VitrimError: the database has been away for longer than the grace period.
        """
        return self.repeat_until_answered(lambda: self._try_to_acquire(run))

    def release(self, run: str) -> None:
        """Give a lease up that is not renewed, see `held`; a database that is away ends it with the grace period."""
        with suppress(VitrimError), self._transaction() as database:
            database.execute(delete(_TABLE).where(self._is_mine(run)))

    @contextmanager
    def held(self, run: str) -> Iterator[Event]:
        """Renew a lease within this context, then give it up; the event is set once the lease is lost."""
        over, lost = Event(), Event()
        thread = Thread(target=self._renew, args=(run, over, lost), daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            over.set()
            thread.join()
            self.release(run)

    def beat(self, run: str) -> bool:
        """Count a lease up, by which others know that this worker is alive; False where another one has taken it."""
        with self._transaction() as database:
            counted = database.execute(update(_TABLE).where(self._is_mine(run)).values(beat=_TABLE.c.beat + 1))
        return counted.rowcount == 1

    def _create_table(self) -> None:
        with self._transaction():
            _TABLE.create(self._engine, checkfirst=True)

    def _try_to_acquire(self, run: str) -> bool:
        this_run = (_TABLE.c.study == self.study) & (_TABLE.c.run == run)
        with self._transaction() as database:
            found = database.execute(select(_TABLE.c.worker, _TABLE.c.beat).where(this_run)).first()
        if found is None:
            try:
                with self._transaction() as database:
                    database.execute(insert(_TABLE).values(study=self.study, run=run, worker=self.worker, beat=0))
            except IntegrityError:
                return False
            return True
        worker, beat = found[0], found[1]
        if worker == self.worker:  # Written by an earlier request whose answer was lost.
            return True
        now = time.monotonic()
        known, since = self._seen.setdefault(run, ((worker, beat), now))
        if known != (worker, beat):
            self._seen[run] = (worker, beat), now
        if has_ended(worker) or (known == (worker, beat) and now - since >= self.grace):
            unchanged = this_run & (_TABLE.c.worker == worker) & (_TABLE.c.beat == beat)
            with self._transaction() as database:
                taken = database.execute(update(_TABLE).where(unchanged).values(worker=self.worker, beat=beat + 1))
            return taken.rowcount == 1
        return False

    def repeat_until_answered(self, request: Callable[[], T]) -> T:
        """What the request returns; it is repeated while it raises `DatabaseAway`, until the grace period is over.

        Raises:
            VitrimError: the database has been away for longer than that.
        """
        start, pauses, reported = time.monotonic(), iter(RETRY_SECONDS), False
        while True:
            try:
                return request()
            except DatabaseAway as error:
                away = time.monotonic() - start
                if away >= self.grace:
                    raise VitrimError(f"{error}; waited {away:.0f} s, repeat the command once it answers") from None
                if not reported:
                    self.report_outage(f"{error}; trying again for {self.grace:.0f} s")
                    reported = True
                time.sleep(min(next(pauses, RETRY_SECONDS[-1]), self.grace - away))

    def _renew(self, run: str, over: Event, lost: Event) -> None:
        pause = self.grace / HEARTBEATS
        alive = time.monotonic()
        while not over.wait(pause):
            sent = time.monotonic()
            with suppress(VitrimError):  # An outage; the next heartbeat may get through.
                if not self.beat(run):
                    break
                alive = sent
            if time.monotonic() - alive > self.grace - pause:  # Before others may count this worker as dead.
                break
        else:
            return
        lost.set()

    def _is_mine(self, run: str):
        return (_TABLE.c.study == self.study) & (_TABLE.c.run == run) & (_TABLE.c.worker == self.worker)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """One transaction; an error of the database becomes one line without the password."""
        try:
            with self._engine.begin() as database:
                yield database
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise cannot_be_used(self.place, error) from None


def cannot_be_used(place: str, error: Exception) -> DatabaseAway:
    """One line about a failed request; `place` is the URL without its password."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    return DatabaseAway(f"the database {place} cannot be used ({reason})")

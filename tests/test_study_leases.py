"""Leases: outages of the database, and the addresses that it may have."""

from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from clocks import Clock
from vitrim.errors import VitrimError
from vitrim.study import leases as module
from vitrim.study.database_url import connect, parse_url
from vitrim.study.leases import GRACE, Leases


class Outage(Clock):
    """A database that is away from `start` to `end`, on a clock that only `sleep` moves."""

    def __init__(self, leases: Leases, start: float, end: float, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.start, self.end, self.requests = start, end, 0
        engine = leases._engine

        def begin() -> Any:
            self.requests += 1
            if self.start <= self.now < self.end:
                raise OperationalError("SELECT", {}, Exception("server closed the connection"))
            return engine.begin()

        leases._engine = SimpleNamespace(begin=begin)  # pyright: ignore
        self.replace_time_in(module, patch)


@pytest.fixture
def worker(tmp_path: Path) -> Leases:
    return Leases(f"sqlite:///{tmp_path}/l.db", "study")


def test_a_request_waits_for_a_database_that_is_away_for_eight_seconds(worker: Leases, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    worker.report_outage = lines.append
    outage = Outage(worker, 0, 8, monkeypatch)
    assert worker.acquire("run")
    assert 8 <= outage.now < 20
    assert outage.requests < 15  # It is not asked without a pause.
    assert len(lines) == 1
    assert "server closed the connection" in lines[0]
    assert "trying again for 120 s" in lines[0]


def test_a_database_that_stays_away_ends_the_worker_after_the_grace_period(
    worker: Leases, monkeypatch: pytest.MonkeyPatch
):
    outage = Outage(worker, 0, 1e9, monkeypatch)
    with pytest.raises(VitrimError, match=r"server closed the connection\); waited \d+ s") as raised:
        worker.acquire("run")
    assert "\n" not in str(raised.value)
    assert GRACE <= outage.now < GRACE + 10


def test_leases_exclude_each_other_and_pass_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    clock.replace_time_in(module, monkeypatch)
    url = f"sqlite:///{tmp_path}/c.db"
    one, two, other = Leases(url, "s"), Leases(url, "s"), Leases(url, "another study")
    assert one.acquire("run")
    assert other.acquire("run")
    for _ in range(9):  # As long as it shows life, however long that is.
        assert not two.acquire("run")
        clock.sleep(0.9 * GRACE)
        assert one.beat("run")
    assert not two.acquire("run")
    clock.sleep(1.1 * GRACE)
    assert two.acquire("run")  # No more signs of life.
    assert not one.beat("run")
    with two.held("run"):
        assert not one.acquire("run")
    assert one.acquire("run")  # Given up.


def test_a_lease_that_is_held_is_renewed_until_another_worker_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HEARTBEATS", 10_000)
    one, two = (Leases(f"sqlite:///{tmp_path}/c.db", "s") for _ in range(2))
    renewed, renew = Event(), two.beat
    monkeypatch.setattr(two, "beat", lambda run: renew(run) and (renewed.set() or True))
    assert two.acquire("run")
    with two.held("run") as lost:
        assert renewed.wait(300)
        assert not lost.is_set()
        with one._engine.begin() as database:
            database.exec_driver_sql("UPDATE vitrim_leases SET worker = 'thief'")
        assert lost.wait(300)
    assert not two.acquire("run")  # What is another's is not given up.


def test_a_lease_whose_answer_was_lost_is_still_held(worker: Leases, monkeypatch: pytest.MonkeyPatch):
    engine, lost = worker._engine, []

    @contextmanager
    def begin():
        with engine.begin() as database:
            yield database
            writes = (
                database.in_transaction()
                and not lost
                and database.exec_driver_sql("SELECT count(*) FROM vitrim_leases").scalar()
            )
        if writes:
            lost.append(True)
            raise OperationalError("COMMIT", {}, Exception("connection reset"))

    worker._engine = SimpleNamespace(begin=begin)  # pyright: ignore
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0,))
    assert worker.acquire("run")
    assert lost


def test_another_workers_run_is_refused_after_an_outage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = (Leases(f"sqlite:///{tmp_path}/l.db", "study") for _ in range(2))
    assert one.acquire("run")
    Outage(two, 0, 8, monkeypatch)
    assert not two.acquire("run")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:se@cret@host/name", "postgresql://me:se/cret@host/name", "postgresql://me:se?cret@host/name",
        "postgresql://me:se#cret@host/name", "postgresql://me:se:cret@host/name", "mysql://m@e:secret@host/name",
    ],
)  # fmt: skip
def test_reserved_characters_in_a_password_are_explained_without_showing_it(text: str):
    with pytest.raises(VitrimError, match="write @ as %40, / as %2F") as raised:
        parse_url(text)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:p@host:port/d", "x", "", "://", "postgresql://[::1/d", "sqlite://me:secret@host/name",
        "sqlite:///l.db?timeout=secret",
    ],
)  # fmt: skip
def test_text_that_is_no_url_is_one_line(text: str):
    with pytest.raises(VitrimError) as raised:
        connect(text)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_quoted_passwords_and_files_with_odd_names_are_accepted(tmp_path: Path):
    assert parse_url("postgresql://me:se%40cr%2Fet@host/name").password == "se@cr/et"
    assert parse_url("postgresql://host/name?sslmode=require").host == "host"
    folder = tmp_path / "a@b:c"
    folder.mkdir()
    assert Leases(f"sqlite:///{folder}/l.db", "s").acquire("run")

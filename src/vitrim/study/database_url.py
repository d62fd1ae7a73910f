"""The address of a database as users type it, and every way in which it can be wrong, in one line without password."""

from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from ..errors import UnknownNameError, VitrimError

_KINDS = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")
_PACKAGES = {
    "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient",
}  # fmt: skip


def connect(text: str) -> Engine:
    """The engine for this URL; nothing is opened yet.

    Raises:
        VitrimError: no URL, a user or password that the URL does not quote, a driver that is not installed, or a
            database that other processes cannot see. The message never repeats the text, which may hold a password.
    """
    url = parse_url(text)
    try:
        # No connection outlives its use, since the processes that read images are forks of this one.
        return create_engine(url, poolclass=NullPool)
    except NoSuchModuleError:
        raise UnknownNameError("kind of database", url.drivername, _KINDS) from None
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        raise VitrimError(f"{url.drivername} needs a driver; run: pip install '{package}'") from None
    except (ArgumentError, TypeError, ValueError):
        raise VitrimError(
            f"the URL in --database has parts that {url.drivername} does not take; write sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/NAME"
        ) from None


def file_url(path: str | Path) -> str:
    """The URL of an SQLite file, in which reserved characters of its name are quoted.

    Raises:
        VitrimError: no URL can hold this name, since it has bytes that are no UTF-8.
    """
    name = str(Path(path).absolute())
    _check_text(name, f"the database would be {name}, but no URL can name a file that is not UTF-8; rename its folder")
    return URL.create("sqlite", database=name).render_as_string(hide_password=False)


def parse_url(text: str) -> URL:
    """The URL in this text, see `connect`."""
    _check_text(text, "--database has bytes that are no UTF-8; choose another place")
    if _ambiguous(text):
        raise VitrimError(
            "user and password in --database must be quoted as in any URL: write @ as %40, / as %2F, : as %3A, "
            "? as %3F, # as %23, % as %25"
        )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise VitrimError(
            "--database is no URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise VitrimError("other workers cannot see a database in memory; write sqlite:///FILE")
    return url


def _check_text(text: str, fault: str) -> None:
    """Raise `VitrimError` for a text that holds bytes that are no UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise VitrimError(fault)


def _ambiguous(text: str) -> bool:
    """Whether a reserved character stands in user or password, which would then be read as host or database."""
    _, _, rest = text.partition("://")
    user, at, _ = rest.rpartition("@")
    return bool(at) and not rest.startswith("/") and (bool({"@", "/", "?", "#"} & set(user)) or user.count(":") > 1)

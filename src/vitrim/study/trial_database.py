"""Opening the database of a sweep, and whether what it holds under a name is the same sweep."""

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from sqlalchemy.pool import NullPool

from ..errors import RecipeError, VitrimError
from .database_url import parse_url

PATIENCE = 30.0
"""Seconds that a process waits while another one writes to the same SQLite file."""


def open_storage(database: str | None, place: str) -> optuna.storages.BaseStorage:
    """The storage at this URL, whose tables are made where there are none; in memory without a URL.

    Raises:
        VitrimError: its tables are of another version of optuna.
    """
    if database is None:
        return optuna.storages.InMemoryStorage()
    waits = {"connect_args": {"timeout": PATIENCE}} if parse_url(database).get_backend_name() == "sqlite" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            # No connection outlives its use, since the processes that read images are forks of this one.
            return optuna.storages.get_storage(
                optuna.storages.RDBStorage(database, engine_kwargs={"poolclass": NullPool, **waits})
            )
        except RuntimeError as error:
            if "schema" not in str(error):
                raise
            raise VitrimError(
                f"the tables in {place} are of another version of optuna than {optuna.__version__}; run: optuna "
                "storage upgrade --storage URL, or choose another --database"
            ) from None


def check_settings(name: str, known: Any, settings: Mapping[str, Any]) -> None:
    """Raise `RecipeError` where a study of this name was not made by a sweep with the same settings."""
    advice = "choose another --name, or another --out or --database"
    if not isinstance(known, dict):
        raise RecipeError(f"the database has a study {name!r} that is not a sweep of vitrim; {advice}")
    changed = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
    if changed:
        raise RecipeError(f"{name!r} in the database is a sweep with another {', '.join(changed)}; {advice}")

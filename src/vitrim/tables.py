"""Tables of named methods: scores, reducers, schedules, terms, losses, model families.

A class or function enters its table when its file is imported, whether that file belongs to vitrim or to a user. The
notation, `vitrim list`, `vitrim.NAME` and the contract tests read the tables.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .errors import DuplicateNameError, UnknownNameError

Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry")


class Table(Mapping[Key, Entry], Generic[Key, Entry]):
    """A mapping in order of entry that takes each name once.

    Args:
        kind: what one entry is, for errors: "score".

    >>> table: Table[str, type] = Table("shape")
    >>> table.enter("Circle", type("Circle", (), {}))
    <class 'vitrim.tables.Circle'>
    >>> list(table)
    ['Circle']
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[Key, Entry] = {}
        self._homes: dict[Key, str] = {}

    def enter(self, name: Key, entry: Entry, source: Any = None) -> Entry:
        """Add an entry and return it; a name that starts with `_` is private and is not added.

        The same class or function from the same module replaces itself, so that a module can be reloaded.

        Args:
            name: in the table.
            entry: what the name means.
            source: the class or function that the entry is made of; by default the entry.

        Raises:
            DuplicateNameError: something else has that name.
        """
        if isinstance(name, str) and name.startswith("_"):
            return entry
        home = home_of(entry if source is None else source)
        if self._homes.get(name, home) != home:
            shown = getattr(name, "__qualname__", name)
            fact = f"there is a {self.kind} named {shown!r} already, {self.home(name)}"
            raise DuplicateNameError(f"{fact}; rename {home}")
        self._entries[name], self._homes[name] = entry, home
        return entry

    def find(self, name: Key) -> Entry:
        """The entry of that name; `UnknownNameError` with the nearest names otherwise."""
        if name not in self._entries:
            raise UnknownNameError(self.kind, str(name), map(str, self))
        return self._entries[name]

    def home(self, name: Key) -> str:
        """Module and qualified name of the class or function that entered a name."""
        return self._homes[name]

    def __getitem__(self, name: Key) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def home_of(source: Any) -> str:
    """Module and qualified name of a class or function, or of the class of anything else."""
    named = source if hasattr(source, "__qualname__") else type(source)
    return f"{named.__module__}.{named.__qualname__}"


def first_line(source: Any) -> str:
    """The first line of its documentation, empty where it has none."""
    lines = (getattr(source, "__doc__", None) or "").strip().splitlines()
    return lines[0] if lines else ""

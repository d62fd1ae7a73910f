"""The options of a verb, from the signature and docstring of a plain function.

A function's parameters are its options; a dataclass among them gives one option for each of its fields.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from inspect import Parameter, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import docstring_parser

from .options import kinds_of

POSITIONAL = ("model", "file", "folder", "kind", "supernet")
"""The subject of a verb is given without the name of an option."""


@dataclass(frozen=True)
class Option:
    """One option: `optim.lr` is the field `lr` of the parameter or field `optim`. A group is a dataclass itself."""

    name: str
    hint: Any
    default: Any
    help: str
    heading: str = ""
    group: bool = False
    refused: bool = False
    """Whether the verb refuses it, which says why; its help leaves it out."""

    @property
    def positional(self) -> bool:
        """Whether it is given without its name."""
        return self.name in POSITIONAL and not self.group

    @property
    def several(self) -> bool:
        """Whether it takes several words."""
        return any(get_origin(kind) is list for kind in kinds_of(self.hint))


@cache
def options_of(function: Callable[..., None]) -> Sequence[Option]:
    """The options of a function, in the order of its signature."""
    found: list[Option] = []
    texts = _texts(function)
    for name, parameter in signature(function, eval_str=True).parameters.items():
        kind, text = parameter.annotation, texts.get(name, "")
        default = MISSING if parameter.default is Parameter.empty else parameter.default
        if is_dataclass(kind):  # A file of such options holds them without a heading of their own.
            found += _fields_of(kind, "", "")
        elif (part := part_of(kind)) is not None:
            without = {f"{name}.{one}" for one in _without(kind)}
            found += [replace(one, refused=one.name in without) for one in _fields_of(part, f"{name}.", text)]
        else:
            found.append(Option(name, kind, default, text))
    return found


@dataclass(frozen=True)
class Without:
    """In `Annotated[dict, DataClass, Without(...)]`: options of the dataclass that a verb refuses."""

    names: tuple[str, ...]


def _without(kind: Any) -> tuple[str, ...]:
    return next((note.names for note in get_args(kind)[1:] if isinstance(note, Without)), ())


def _fields_of(kind: Any, prefix: str, heading: str) -> Iterator[Option]:
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    groups: list[Iterator[Option]] = []
    for field in fields(kind):
        name, hint, text = prefix + field.name, hints[field.name], texts.get(field.name, "")
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        part = next((one for one in kinds_of(hint) if is_dataclass(one)), None)
        if part is None:
            yield Option(name, hint, default, text, heading)
        else:
            yield Option(name, hint, default, "all options of this section, as a mapping", text, group=True)
            groups.append(_fields_of(part, f"{name}.", text))
    for group in groups:
        yield from group


@cache
def _texts(thing: Any) -> dict[str, str]:
    """The text about each argument in its docstring."""
    found = docstring_parser.parse(thing.__doc__ or "").params
    return {one.arg_name: " ".join((one.description or "").split()) for one in found}


def part_of(kind: Any) -> Any:
    """The dataclass behind `Annotated[dict, DataClass]`, of which a function takes the given options only."""
    noted = get_args(kind)[1] if get_origin(kind) is Annotated else None
    return noted if isinstance(noted, type) and is_dataclass(noted) else None

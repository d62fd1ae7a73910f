"""The parser of a verb's words, and with it the help that lists and explains its options."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

import docstring_parser

from .options import describe, kinds_of, plain, range_of
from .verb_options import Option, options_of
from .yaml_text import dump_yaml


class UsageError(Exception):
    """Words of a command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Given(argparse.Action):
    """Keeps the words of every option that is given, in their order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given.append((self.dest, values))


def make_parser(
    prog: str, function: Callable[..., None], needs: bool = True, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of the words of one verb, whose values are words still.

    Args:
        prog: the verb, as a message names it.
        function: what the verb runs.
        needs: refuse a missing subject.
        epilog: what the help ends with.
    """
    about = " ".join((docstring_parser.parse(function.__doc__ or "").short_description or "").split())
    options = options_of(function)
    parser = _Parser(
        prog=prog, usage=_usage(prog, options), description=_escaped(about), epilog=epilog, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action=_Given, metavar="FILE",
        help="read options from this YAML file; an option given on the command line has precedence, and its value null "
        "unsets it",
    )  # fmt: skip
    parser.add_argument(
        "--print_config", action="store_true", help="print all options as such a file would hold them, and exit"
    )
    places: dict[str, Any] = {"": parser}
    for option in options:
        if option.heading not in places:
            title = f"{option.name.partition('.')[0]}: {_escaped(option.heading.removesuffix('.'))}"
            places[option.heading] = parser.add_argument_group(title)
        _add(places[option.heading], option, needs)
    return parser


def _usage(prog: str, options: Sequence[Option]) -> str:
    """The subject and what must be given; all other options are in the list below."""
    words = [prog]
    for option in options:
        name = option.name + (f" [{option.name} ...]" if option.several else "")
        if option.positional:
            words.append(name if option.default is MISSING else f"[{name}]")
    words += [f"--{one.name} {one.name.upper()}" for one in options if one.default is MISSING and not one.positional]
    return _escaped(" ".join([*words, "[--OPTION VALUE ...]"]))


def _add(place: Any, option: Option, needs: bool) -> None:
    words: dict[str, Any] = {"action": _Given, "default": argparse.SUPPRESS}
    words["help"] = argparse.SUPPRESS if option.refused else _help(option)
    kinds = kinds_of(option.hint)
    if option.positional:
        needed = needs and option.default is MISSING
        words["nargs"] = ("+" if needed else "*") if option.several else (None if needed else "?")
        place.add_argument(option.name, **words)
        return
    words["metavar"] = option.name.rpartition(".")[2].upper()
    if option.several:
        words["nargs"] = "+"
    elif bool in kinds:
        words |= {"metavar": "true|false", "nargs": "?", "const": "true"}
    place.add_argument(f"--{option.name}", **words)


def _help(option: Option) -> str:
    hint = option.hint
    if option.several:
        hint = get_args(next(kind for kind in kinds_of(hint) if get_origin(kind) is list))[0]
    takes = describe(hint)
    if option.default is None:  # Nobody types null to get what is so without it.
        takes = takes.removesuffix(f" or {describe(NoneType)}")
    if (bounds := range_of(hint)) is not None:
        takes += f", {bounds}"
    if option.several:
        takes = f"one or several; each {takes}"
    if option.default is MISSING:
        ends = "required"
    elif option.default in (None, ""):
        ends = "optional"
    elif option.group:
        ends = "default: that of each option"
    else:
        default = option.default if isinstance(option.default, list) else [option.default]
        ends = f"default: {' '.join(map(_written, default))}"
    return _escaped(f"{option.help.removesuffix('.')}. ({takes}; {ends})")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else dump_yaml(plain(value)).removesuffix("...\n").strip()


def _escaped(text: str) -> str:
    return text.replace("%", "%%")

"""Command-line options from the signature and docstring of a plain function.

A function's parameters are its options; a dataclass among them gives one option for each of its fields. Words of the
command line become values by the same rules as values of a file (`vitrim.options`): both are plain data, and no text
can name a class or make anything be imported.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, signature
from types import NoneType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser

from .errors import RecipeError, VitrimError
from .options import describe, from_dict, kinds_of, merge, plain, range_of, read_yaml, typed, typed_values
from .text import short
from .yaml_text import dump_yaml, parse_yaml

POSITIONAL = ("model", "file", "folder", "kind", "supernet")
"""The subject of a verb is given without the name of an option."""


class UsageError(Exception):
    """Words of a command line that cannot be understood."""


@dataclass(frozen=True)
class Option:
    """One option: `optim.lr` is the field `lr` of the parameter or field `optim`. A group is a dataclass itself."""

    name: str
    hint: Any
    default: Any
    help: str
    heading: str = ""
    group: bool = False

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
        elif (part := _mapped(kind)) is not None:
            found += _fields_of(part, f"{name}.", text)
        else:
            found.append(Option(name, kind, default, text))
    return found


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


def _mapped(kind: Any) -> Any:
    """The dataclass behind `Annotated[dict, DataClass]`, of which a function takes the given options only."""
    noted = get_args(kind)[1] if get_origin(kind) is Annotated else None
    return noted if isinstance(noted, type) and is_dataclass(noted) else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Given(argparse.Action):
    """Keeps the words of every option that is given, in their order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given.append((self.dest, values))


def make_parser(prog: str, function: Callable[..., None], needs: bool = True) -> argparse.ArgumentParser:
    """The parser of the words of one verb, whose values are words still; `needs` refuses a missing subject."""
    about = " ".join((docstring_parser.parse(function.__doc__ or "").short_description or "").split())
    options = options_of(function)
    parser = _Parser(prog=prog, usage=_usage(prog, options), description=_escaped(about), allow_abbrev=False)
    parser.add_argument(
        "--config", action=_Given, metavar="FILE",
        help="read options from this YAML file; an option given on the command line has precedence",
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
    words: dict[str, Any] = {"action": _Given, "default": argparse.SUPPRESS, "help": _help(option)}
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
    if (bounds := range_of(hint)) is not None:
        takes += f", {bounds}"
    if option.several:
        takes = f"one or several; each {takes}"
    if option.default is MISSING:
        ends = "required"
    elif option.group:
        ends = f"default: {'null' if option.default is None else 'each its own'}"
    else:
        default = option.default if isinstance(option.default, list) else [option.default]
        ends = f"default: {' '.join(map(_written, default))}"
    return _escaped(f"{option.help.removesuffix('.')}. ({takes}; {ends})")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else dump_yaml(plain(value)).removesuffix("...\n").strip()


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def run(function: Callable[..., None], prog: str) -> None:
    """Call a function with the command line of this process, for scripts; mistakes are one line and exit code 2."""
    try:
        function(**parse_words(function, prog, sys.argv[1:]))
    except (UsageError, VitrimError) as error:
        sys.exit(f"{prog}: {error}")


def parse_words(function: Callable[..., None], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """The arguments that a command line, and the files it names, give to a function.

    `--help` and `--print_config` print and exit.

    Raises:
        UsageError: words that cannot be understood.
        VitrimError: a file or a value that cannot be used.
    """
    options = options_of(function)
    by_name = {option.name: option for option in options}
    parser = make_parser(prog, function, needs="-h" in words or "--help" in words)
    namespace, rest = argparse.Namespace(given=[]), list[str]()
    try:
        _, rest = parser.parse_known_intermixed_args(_with_flags(words, by_name), namespace)
    except UsageError as error:
        raise UsageError(_plainly(str(error))) from None
    if wrong := next((word for word in rest if word.startswith("-")), None):
        raise UsageError(_unknown("option", wrong.partition("=")[0], [f"--{name}" for name in by_name]))
    if rest:
        raise UsageError(f"{rest[0]!r} is one word too many; options begin with --")
    data = _from_files(function, options, [words for name, words in namespace.given if name == "config"])
    for name, given in namespace.given:
        if name != "config":
            _set(data, by_name[name], _value(by_name[name], given))
    if namespace.print_config:
        print(dump_yaml(_complete(function, data)), end="")
        sys.exit(0)
    return _arguments(function, data)


def _with_flags(words: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """The words, where an option that is true or false says so itself if the subject may follow it."""
    if not any(option.positional for option in options.values()):
        return [*words]
    flags = {f"--{name}" for name, option in options.items() if bool in kinds_of(option.hint)}
    following = [*words, ""][1:] if words else []
    return [
        f"{word}=true" if word in flags and after not in ("true", "false", "null") else word
        for word, after in zip(words, following, strict=True)
    ]


def _from_files(function: Callable[..., None], options: Sequence[Option], files: Sequence[str]) -> dict[str, Any]:
    """The options in these files, each checked by itself; a later file has precedence."""
    data: dict[str, Any] = {}
    known = [option.name for option in options if option.name not in POSITIONAL]
    for file in files:
        found = read_yaml(file)
        for name in found:
            if name not in known and not any(one.startswith(f"{name}.") for one in known):
                raise UsageError(f"{file}: " + _unknown("option", f"--{name}", [f"--{one}" for one in known]))
        _arguments(function, found, partly=True)
        data = merge(data, found)
    return data


def _value(option: Option, words: Any) -> Any:
    """The value that the words of an option stand for."""
    if isinstance(words, list):
        kind = next(one for one in kinds_of(option.hint) if get_origin(one) is list)
        return [_scalar(get_args(kind)[0], word, option.name) for word in words]
    return _scalar(option.hint, words, option.name)


def _scalar(hint: Any, word: str, name: str) -> Any:
    kinds = kinds_of(hint)
    if NoneType in kinds and word == "null":
        return None
    if str in kinds and len(kinds) <= 1 + (NoneType in kinds):
        return word
    if any(type(one) is str for kind in kinds for one in get_args(kind)):  # Words to choose from.
        return typed(hint, word, name)
    try:
        value = parse_yaml(word, f"--{name}")
    except RecipeError as error:
        if word.lstrip()[:1] in ("{", "["):
            raise
        value = word
        if str in kinds:
            return word
        raise RecipeError(f"{name} is {word[:60]!r}; it must be {describe(hint)}") from error
    return word if str in kinds and not isinstance(value, int | float) else value


def _set(data: dict[str, Any], option: Option, value: Any) -> None:
    """Put a value where its dotted name says; a group is laid over what is known of it."""
    *outer, last = option.name.split(".")
    for name in outer:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    if option.group and isinstance(value, dict) and isinstance(data.get(last), dict):
        value = merge(data[last], value)
    data[last] = value


def _arguments(function: Callable[..., None], data: Mapping[str, Any], partly: bool = False) -> dict[str, Any]:
    """The arguments for a function; `partly` checks what is there, and needs nothing."""
    left, arguments = dict(data), dict[str, Any]()
    for name, parameter in signature(function, eval_str=True).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            names = [field.name for field in fields(kind)]
            arguments[name] = from_dict(kind, {one: left.pop(one) for one in names if one in left}, name, prefix="")
        elif (part := _mapped(kind)) is not None:
            given = left.pop(name, {})
            if not isinstance(given, dict):
                raise RecipeError(f"{name} is {short(given)}; it must be a mapping of options")
            arguments[name] = typed_values(part, given, name)
        elif name in left:
            arguments[name] = typed(kind, left.pop(name), name)
        elif parameter.default is Parameter.empty and not partly:
            raise UsageError(f"missing: {name if name in POSITIONAL else '--' + name}")
    return arguments


def _complete(function: Callable[..., None], data: Mapping[str, Any]) -> dict[str, Any]:
    """All options, those that are not given at their defaults."""
    arguments = _arguments(function, data, partly=True)
    printed: dict[str, Any] = {}
    for name, parameter in signature(function, eval_str=True).parameters.items():
        value: Any = arguments.get(name, None if parameter.default is Parameter.empty else parameter.default)
        if is_dataclass(parameter.annotation):
            printed |= asdict(value)
        elif name not in POSITIONAL and (name in arguments or parameter.default is not Parameter.empty):
            part = _mapped(parameter.annotation)
            printed[name] = value if part is None else asdict(part(**value))
    return plain(printed)


def _plainly(message: str) -> str:
    """A message of argparse, shorter."""
    found = re.search(r"argument (\S+?):? expected (.*)", message)
    return f"{found[1]} needs {found[2]}" if found else message


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name[:60], known, n=3, cutoff=0.5)
    return f"unknown {kind} {name[:60]}" + (f"; did you mean {' or '.join(near)}?" if near else "")

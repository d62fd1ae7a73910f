"""The words of a command line, and the files it names, as arguments of a plain function.

Words become values by the same rules as values of a file (`vitrim.options`): both are plain data, and no text can name
a class or make anything be imported.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from inspect import Parameter, signature
from types import NoneType
from typing import Any, get_args, get_origin

from .errors import RecipeError, VitrimError
from .options import describe, from_dict, kinds_of, merge, plain, typed, typed_values
from .places import read_recipe
from .text import short
from .verb_help import UsageError, make_parser
from .verb_options import POSITIONAL, Option, options_of, part_of
from .yaml_text import dump_yaml, parse_yaml


def run(function: Callable[..., None], prog: str) -> None:
    """Call a function with the command line of this process, for scripts; mistakes are one line and exit code 2."""
    try:
        function(**parse_words(function, prog, sys.argv[1:]))
    except (UsageError, VitrimError) as error:
        sys.exit(f"{prog}: {error}")


def parse_words(
    function: Callable[..., None], prog: str, words: Sequence[str], epilog: str | None = None
) -> dict[str, Any]:
    """The arguments that a command line, and the files it names, give to a function.

    `--help`, which ends with `epilog`, and `--print_config` print and exit.

    Raises:
        UsageError: words that cannot be understood.
        VitrimError: a file or a value that cannot be used.
    """
    options = options_of(function)
    by_name = {option.name: option for option in options}
    parser = make_parser(prog, function, needs="-h" in words or "--help" in words, epilog=epilog)
    namespace, rest = argparse.Namespace(given=[]), list[str]()
    try:
        _, rest = parser.parse_known_intermixed_args(_with_flags(words, by_name), namespace)
    except UsageError as error:
        raise UsageError(_plainly(str(error))) from None
    if wrong := next((word for word in rest if word.startswith("-")), None):
        wrong = wrong.partition("=")[0]
        if (own := by_name.get(wrong.removeprefix("--"))) is not None and own.positional:
            raise UsageError(f"{own.name} is given without {wrong}: {prog} {own.name.upper()} [--OPTION VALUE ...]")
        known = [f"--{option.name}" for option in options if not (option.refused or option.positional)]
        raise UsageError(_unknown("option", wrong, known))
    if rest:
        raise UsageError(f"{rest[0]!r} is one word too many; options begin with --")
    data = _from_files(function, options, [words for name, words in namespace.given if name == "config"])
    for name, given in namespace.given:
        if name != "config":
            _set(data, by_name[name], _value(by_name[name], given))
    if namespace.print_config:
        print(dump_yaml(_complete(function, data)), end="")
        sys.exit(0)
    _check_subject(options, data, namespace.given)
    return _arguments(function, data)


def _check_subject(options: Sequence[Option], data: Mapping[str, Any], given: Sequence[tuple[str, Any]]) -> None:
    """Raise `UsageError` where the subject is missing because an option before it has taken it for one of its words."""
    missing = [one.name for one in options if one.positional and one.default is MISSING and one.name not in data]
    greedy = [name for name, words in given if isinstance(words, list)]
    if missing and greedy:
        raise UsageError(
            f"missing: {missing[0]}; --{greedy[0]} takes all words that follow it, so begin with {missing[0]}"
        )


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
        found = read_recipe(file)
        for name in found:
            if name not in known and not any(one.startswith(f"{name}.") for one in known):
                raise UsageError(f"{file}: " + _unknown("option", f"--{name}", [f"--{one}" for one in known]))
        try:
            _arguments(function, found, partly=True)
        except VitrimError as error:
            raise RecipeError(f"{file}: {error}") from None
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
        elif (part := part_of(kind)) is not None:
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
            printed[name] = value  # Of images, what is given: the rest is left to the model.
    return plain(printed)


def _plainly(message: str) -> str:
    """A message of argparse, shorter."""
    found = re.search(r"argument (\S+?):? expected (.*)", message)
    return f"{found[1]} needs {found[2]}" if found else message


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name[:60], known, n=3, cutoff=0.5)
    return f"unknown {kind} {name[:60]}" + (f"; did you mean {' or '.join(near)}?" if near else "")

"""The command: verbs and options to plain functions, nothing else."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from pydoc import locate
from typing import Annotated, Any, NoReturn, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from . import __version__
from .errors import VitrimError
from .options import read_yaml
from .output import FULL
from .train.recipe import Recipe
from .train.stopping import Stopped
from .user_files import HELP, import_files, split_imports
from .verbs import VERBS

POSITIONAL = ("model", "file", "folder", "kind", "supernet")
"""What a verb is about stands behind it without a name."""


class _Parser(ArgumentParser):
    """One line per mistake, with the nearest valid names, and where to read on."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore
        if not self.exit_on_error:  # Of a group that may be left out; who asked for it tells its name.
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        line, prog = " ".join(str(message).split()), parser.prog
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        if found := re.search(r'"(\w+)": .* class_path \'([\w.]+)\': (.*) - Expected a <class .NoneType', line):
            group, kind, line = found.groups()  # What the parser of a group that may be left out says of its options.
            known = [f"--{group}.{option.name}" for option in fields(locate(kind))]  # pyright: ignore
            line = re.sub(r'^(Parser key "|Option \')', rf"\1{group}.", line)
        if found := re.search(r"unrecognized arguments: --([^ =]+)|(?:accept option|^Option) '([^']+)'", line):
            line = _unknown("option", "--" + (found[1] or found[2]), known)
        elif found := re.search(r"argument verb: invalid choice: '([^']*)'", line):
            line = _unknown("verb", found[1], VERBS)
        elif found := re.search(
            r'"([\w.]+)": .*?(?:Expected a|Subtypes:) (.*?)\.? (?:Errors: .* value: |Got value: )(.*)', line
        ):
            line = f"{found[1]} is {found[3]!r}; it must be {_kinds(found[2])}"
        elif found := re.search(r"arguments are required: (?:(\w+)\.)?(.*)", line):
            line, prog = f"missing: {found[2]}", f"vitrim {found[1]}" if found[1] else prog
        elif 'expected "verb"' in line:
            line = f"missing: one of {', '.join(VERBS)}"
        print(f"{prog}: {line} (see {prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _kinds(types: str) -> str:
    if choices := re.search(r"Literal\[(.*?)\]", types):
        return f"one of {choices[1]}"
    said = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "NoneType": "null"}
    names = re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>", types)
    return " or ".join(said.get(name, "a mapping of options") for name in names) or types


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"unknown {kind} {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="vitrim",
        version=__version__,
        allow_abbrev=False,
        description="Make any Vision Transformer cheaper, and say exactly what it costs.",
        epilog=f"before or after the verb: {HELP}",
    )
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="verb")
    for name, function in VERBS.items():
        help_line = (function.__doc__ or "").strip().splitlines()[0]
        verb = _Parser(description=help_line)
        verb.add_argument("--config", action="config", help="read options from this YAML file")
        _add_options(verb, function)
        verbs.add_subcommand(name, verb, help=help_line)
        verb.prog = f"vitrim {name}"
    return parser


def _add_options(verb: ArgumentParser, function: Callable[..., None]) -> None:
    """Options from a signature and its docstring: classes give groups, lists take several values, booleans none."""
    told = {p.arg_name: p.description or "" for p in docstring_parser.parse(function.__doc__ or "").params}
    for name, parameter in signature(function, eval_str=True).parameters.items():
        kind, required = parameter.annotation, parameter.default is parameter.empty
        kind = _group_of(kind) or kind
        if is_dataclass(kind):  # A recipe file holds the options themselves, not a `recipe:` heading.
            verb.add_class_arguments(kind, None if kind is Recipe else name)
            continue
        options: dict[str, Any] = {"help": told[name], "type": kind}
        if "list[" in str(kind) and "dict[" not in str(kind):
            options |= {"type": int if "int" in str(kind) else str, "nargs": "+"}
        if not required:
            options["default"] = parameter.default
        if name in POSITIONAL:
            verb.add_argument(name, **({} if required else {"nargs": "?"}) | options)
        else:
            verb.add_argument(f"--{name}", required=required, **options)
    for action in verb._actions:
        if getattr(action, "_typehint", None) in (bool, bool | None):
            action.nargs, action.const = "?", True


def _group_of(kind: Any) -> Any:
    """The class whose options are meant, where a function takes those that are given as a mapping."""
    return get_args(kind)[1] if get_origin(kind) is Annotated else None


def _groups(function: Callable[..., None]) -> Iterator[str]:
    """Names of what holds options itself; a file of --config may give them a plain value."""
    for name, parameter in signature(function, eval_str=True).parameters.items():
        kind = _group_of(parameter.annotation) or parameter.annotation
        if kind is Recipe:
            yield from (option.name for option in fields(Recipe) if is_dataclass(option.default_factory))
        elif is_dataclass(kind):
            yield name


def main(argv: list[str] | None = None) -> None:
    """Run one verb; user mistakes are one line and exit code 2."""
    warnings.filterwarnings("ignore", module="torch|timm|accelerate|PIL")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # It looks for a compiler nobody needs.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    argv, user_files = split_imports(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        parsed = parser.parse_args(argv)
    except UnicodeDecodeError as error:
        parser.error(f"the file given by --config is not text in UTF-8 ({error.reason} at byte {error.start})")
    verb = parsed["verb"]
    for group in _groups(VERBS[verb]):
        if not isinstance(parsed[verb].get(group), Namespace):
            parser.error(f"{group} is {parsed[verb].get(group)!r}; it must be a mapping of options")
    options = dict(parser.instantiate(parsed)[verb])
    files = filter(None, options.pop("config", None) or ())  # None stands for options in place of a file.
    for name, parameter in signature(VERBS[verb], eval_str=True).parameters.items():
        if _group_of(parameter.annotation) is not None:
            options[name] = vars(parser.parse_args(argv, defaults=False)[verb].get(name, Namespace()))
    if verb == "train":
        out = options.pop("out")
        options = {"recipe": Recipe(**options), "out": out}
    try:
        import_files(user_files)
        for file in files:
            read_yaml(file)  # Refuses names that are given twice, of which the parser has taken the last.
        if options.get("device") == "cuda":
            _expect_cuda()
        VERBS[verb](**options)
    except VitrimError as error:  # A worker process wraps it in a traceback, of which it is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix("vitrim.errors.")
        _leave(verb, re.sub(r"^\w+Error: ", "", line), 2)
    except Stopped as stopped:
        _leave(verb, str(stopped), stopped.code)
    except KeyboardInterrupt:
        _leave(verb, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The interpreter flushes it once more.
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise  # Not about a file, so that nobody can tell what to do.
        _leave(verb, f"{error.filename or 'cannot write'}: {error.strerror}", 2)


def _expect_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VitrimError("there is no CUDA device here; use --device cpu")


def _leave(verb: str, line: str, code: Any) -> NoReturn:
    print(f"vitrim {verb}: {line}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()

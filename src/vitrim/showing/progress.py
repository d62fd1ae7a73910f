"""Live progress of a run: a line at its start, one bar for the whole run, a line per epoch; also of evaluations.

Without a terminal there is no bar; a line a minute takes its place, so that a long epoch is not silent.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..text import counted, printable
from ..train.state import Report

_PERIOD = 1800.0
"""Seconds over which speed is averaged, so that the time left does not jump where an epoch ends and is evaluated."""


_LINE_PERIOD = 60.0
"""Seconds between two lines where there is no bar."""


@contextmanager
def live(
    console: Console | None = None, label: str = "", clock: Callable[[], float] = time.monotonic
) -> Iterator[Report]:
    """A function for the training loop to call.

    Args:
        console: where to print; by default standard error. Without a terminal it gets a line a minute for the bar.
        label: printed in front of every line.
        clock: gives the time in seconds.
    """
    console = console or Console(stderr=True)
    last_line = clock()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=_PERIOD,
        disable=not console.is_interactive,  # It would end with an empty line.
    ) as progress:
        task, started = progress.add_task(escape(label), total=None, figures=""), False

        def say(line: str) -> None:
            nonlocal last_line
            last_line = clock()
            progress.console.print(printable(line), highlight=False, markup=False)

        def say_without_bar(line: str) -> None:
            if not progress.console.is_terminal and clock() - last_line >= _LINE_PERIOD:
                say(line)

        def report(event: str, figures: Mapping[str, Any]) -> None:
            nonlocal started
            if event == "cache":
                done, total = figures["done"], figures["rows"]
                progress.update(
                    task, description=_plain(_cache(label, figures)), completed=done, total=total, figures=""
                )
                if done == total:
                    say(f"{_cache(label, figures)}  {total} images")
                    progress.reset(task)
                else:
                    say_without_bar(f"{_cache(label, figures)}  {done} of {total} images")
            elif event == "start":
                say(_start(label, figures))
            elif event == "step":
                epoch, steps = figures["epoch"], figures["steps"]
                total, done = figures["epochs"] * steps, epoch * steps + figures["step"]
                if not started:  # Steps of an earlier call took no time in this one.
                    progress.reset(task, completed=done, total=total)
                    started = True
                name = _plain(f"{label} epoch {epoch + 1}".strip())
                progress.update(task, description=name, completed=done, total=total, figures=_plain(_now(figures)))
                say_without_bar(f"{_epoch(label, figures)}  step {figures['step']}/{steps}  {_now(figures)}")
            elif event == "evaluation":
                batches = f"batch {figures['done']} of {figures['batches']}"
                progress.update(task, description=_plain(f"{label} evaluation".strip()), figures=batches)
                say_without_bar(f"{label} evaluation  {batches}".strip())
            elif event == "epoch":
                say(_line(label, figures))
            elif event == "run":
                started = False
                say(figures["name"])
            elif event == "done":
                progress.reset(task, total=None)
            elif event == "wait":
                waiting = f"waiting for other workers: {figures['runs']} runs"
                progress.update(task, description=waiting, figures="")
                say_without_bar(waiting)
            elif event == "outage":
                say(figures["line"])

        yield report


def _plain(text: str) -> str:
    """Text from options for a bar, in which brackets would be read as markup."""
    return escape(printable(text))


def _cache(label: str, figures: Mapping[str, Any]) -> str:
    return f"{label} teacher cache, {figures['name']}".strip()


def _start(label: str, figures: Mapping[str, Any]) -> str:
    images = counted(figures["images"], "image") + (f", {figures['held_out']} held out" if figures["held_out"] else "")
    where = (
        figures["device"] if figures["processes"] == 1 else f"{figures['processes']} processes on {figures['device']}"
    )
    epochs = f"{counted(figures['epochs'], 'epoch')} of {counted(figures['steps'], 'step')}"
    if figures["epoch"] or figures["step"]:
        epochs += f", continued at epoch {figures['epoch'] + 1}, step {figures['step'] + 1}"
    return f"{label} {images}  {epochs}  {where}  {figures['folder']}".strip()


def _epoch(label: str, figures: Mapping[str, Any]) -> str:
    return f"{label} epoch {figures['epoch'] + 1}/{figures['epochs']}".strip()


def _now(figures: Mapping[str, Any]) -> str:
    text = f"loss {figures['loss']:.3f}{_terms(figures)}"
    if figures["accuracy"] is not None:
        text += f"  acc {figures['accuracy']:.1%}"
    text += f"  {_speed(figures)}"
    return text if figures["tokens"] is None else f"{text}  {figures['tokens']} tokens"


def _line(label: str, figures: Mapping[str, Any]) -> str:
    parts = [_epoch(label, figures)]
    parts.append(f"train loss {figures['train_loss']:.3f}{_terms(figures)}")
    if "val_accuracy" in figures:
        parts.append(f"held-out accuracy {figures['val_accuracy']:.2%}")
    elif "val_loss" in figures:
        parts.append(f"held-out loss {figures['val_loss']:.4f}")
    if figures.get("strength") is not None:
        parts.append(f"tokens {figures['tokens'][0]} to {figures['tokens'][-1]}")
    parts.append(_speed(figures))
    return "  ".join(parts)


def _speed(figures: Mapping[str, Any]) -> str:
    speed = figures["images_per_second"]
    return f"{speed:.{1 if speed < 10 else 0}f} images/s"


def _terms(figures: Mapping[str, Any]) -> str:
    """The terms of a distillation, in brackets."""
    known = [f"{name} {value:.3f}" for name, value in figures["terms"].items()]
    return f" ({', '.join(known)})" if known else ""

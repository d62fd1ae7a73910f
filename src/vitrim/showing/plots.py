"""Plots of figures: accuracy against cost, and training curves. No torch, and no global state of matplotlib."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import IO, Any
from warnings import catch_warnings, filterwarnings

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..text import printable, shortened

Row = Mapping[str, Any]
Target = str | Path | IO[bytes]

# Okabe and Ito's colours, which colour-blind readers can tell apart, also in print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
MOST_CURVES = len(_COLOURS) * len(_DASHES)
"""Runs whose curves can be distinguished."""
MOST_SERIES = 100
"""Methods in one plot of accuracy against cost."""
_MOST_LETTERS = 60
_LARGEST = 1e18  # Beyond it a number is damage; axes overflow at some point.
_INK, _GRID = "#3b3f46", "#e3e5e9"
_COSTS = {"macs": "MACs per image", "images_per_second": "images per second"}
_PANELS = {
    "loss": (("train_loss", "training"), ("val_loss", "validation")),
    "accuracy": (("train_accuracy", "training"), ("val_accuracy", "validation")),
    "tokens leaving the last block": (("tokens", "tokens"),),
    "images per second": (("images_per_second", "training"),),
}


def cost_accuracy_plot(rows: Sequence[Row], path: Target) -> bool:
    """Plot accuracy against each cost that the rows know.

    Args:
        rows: each with `accuracy` (a fraction) and `macs` (per image) and/or `images_per_second`. Rows of one
            `method` form a series; the method "dense" (or a true `dense`) is marked and not joined. The best
            accuracy at no more cost, over all rows, is drawn as frontier.
        path: file or open file to write.

    Returns:
        False, and nothing is written, where no row has both an accuracy and a cost, or methods are too many to plot.
    """
    known = {cost: [row for row in rows if _number(row, "accuracy") and _number(row, cost)] for cost in _COSTS}
    costs = [cost for cost in _COSTS if known[cost]]
    names = list(dict.fromkeys(_series(row) for row in rows if not _is_dense(row)))
    if not costs or len(names) > MOST_SERIES:
        return False
    figure = _figure(len(costs), width=5.6)
    for at, cost in enumerate(costs):
        axes = _axes(figure, len(costs), at, _COSTS[cost], "accuracy" if at == 0 else "")
        front = frontier(known[cost], cost)
        axes.plot(
            [row[cost] for row in front], [row["accuracy"] for row in front], color="#c9cdd4", linewidth=7,
            solid_capstyle="round", solid_joinstyle="round", label="frontier", zorder=1,
        )  # fmt: skip
        for index, name in enumerate(names):
            points = sorted(
                (row[cost], row["accuracy"]) for row in known[cost] if not _is_dense(row) and _series(row) == name
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker=_MARKERS[index % len(_MARKERS)], markersize=6.5,
                    color=_COLOURS[index % len(_COLOURS)], linewidth=1.6, label=_label(name), zorder=3,
                )  # fmt: skip
        dense = [row for row in known[cost] if _is_dense(row)]
        axes.scatter(
            [row[cost] for row in dense], [row["accuracy"] for row in dense], marker="*", s=230, color=_INK,
            edgecolor="white", linewidth=1, label="dense" if dense else None, zorder=4,
        )  # fmt: skip
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.xaxis.set_major_formatter(lambda value, position: short(value))
        axes.margins(0.08)
    _save(figure, path)
    return True


def frontier(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows that no other beats: cheapest first, each more accurate than all cheaper ones."""
    cheap = -1 if cost == "images_per_second" else 1
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (cheap * row[cost], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def curves_plot(metrics: Sequence[Row] | Mapping[str, Sequence[Row]], path: Target) -> bool:
    """Plot what changed over the epochs: loss, accuracy, tokens, speed.

    Args:
        metrics: one mapping per epoch, as in `metrics.jsonl`; or several runs by name, of which validation curves
            are compared where they have any. A list, as `tokens` may be, counts by its last item.
        path: file or open file to write.

    Returns:
        False, and nothing is written, where there is nothing to plot.
    """
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    styles = {name: _style(index) for index, name in enumerate(runs)}  # A run keeps its own in every panel.
    panels: list[tuple[str, list[tuple[str, list[float], list[float]]]]] = []
    for title, keys in _PANELS.items():
        lines: list[tuple[str, list[float], list[float]]] = []
        for name, run in runs.items():
            found = [(label, *_curve(run, key)) for key, label in keys]
            found = [curve for curve in found if curve[1]]
            lines += [(name, *curve[1:]) for curve in found[-1:]] if name else found
        if lines and not (title.startswith("tokens") and len({y for _, _, ys in lines for y in ys}) == 1):
            panels.append((title, lines))
    if not panels:
        return False
    figure = _figure(len(panels), width=4.2)
    for at, (title, lines) in enumerate(panels):
        axes = _axes(figure, len(panels), at, "epoch", "", title)
        for index, (label, xs, ys) in enumerate(lines):
            marker = "o" if len(xs) < 25 else ""
            shown = _label(label) if len(lines) > 1 or len(runs) > 1 else ""
            style = styles[label] if len(runs) > 1 else _style(index)
            axes.plot(xs, ys, marker=marker, markersize=4, linewidth=1.8, label=shown, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        if "second" in title:
            axes.set_ylim(0, 1.08 * max(max(y for _, _, ys in lines for y in ys), 1e-9))
    _save(figure, path)
    return True


def short(value: float) -> str:
    """A count in the fewest letters: 4.61 G, 131 M, 940."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _number(row: Row, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _series(row: Row) -> str:
    return str(row.get("method") or row.get("model") or "")


def _is_dense(row: Row) -> bool:
    return bool(row.get("dense")) or _series(row) == "dense"


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
    }


def _curve(run: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Epochs, counted from one, and the values that are numbers."""
    xs: list[float] = []
    ys: list[float] = []
    for at, epoch in enumerate(run):
        value: Any = epoch.get(key)
        value = value[-1] if isinstance(value, list) and value else value
        if _number({key: value}, key):
            xs.append((epoch["epoch"] if _number(epoch, "epoch") else at) + 1)
            ys.append(float(value))
    return xs, ys


def _figure(panels: int, width: float) -> Figure:
    columns, rows = _layout(panels)
    figure = Figure(
        figsize=(width * columns, 3.6 * rows),
        layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    return figure


def _layout(panels: int) -> tuple[int, int]:
    columns = panels if panels <= 3 else 2
    return columns, ceil(panels / columns)


def _axes(figure: Figure, panels: int, at: int, x: str, y: str, title: str = "") -> Axes:
    columns, rows = _layout(panels)
    axes = figure.add_subplot(rows, columns, at + 1)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b4b8c0")
    axes.tick_params(colors=_INK, length=3)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _save(figure: Figure, path: Target) -> None:
    """Write the figure, with one legend below all panels where there are several series."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    entries = {label: handle for label, handle in entries.items() if label}
    if len(entries) > 1:
        letters = max(len(label) for label in entries) + 6
        columns = max(1, min(len(entries), int(13 * figure.get_figwidth() / letters)))
        figure.set_figheight(figure.get_figheight() + 0.2 * (ceil(len(entries) / columns) - 1))
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", frameon=False,
            ncols=columns, labelcolor=_INK, fontsize=9.5,
        )  # fmt: skip
    with catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing from")  # A name in letters that the font does not have.
        figure.savefig(path, dpi=160, format=None if isinstance(path, str | Path) else "png")


def _label(name: str) -> str:
    """A name for a legend: a dollar sign would start a formula, and an underscore in front would hide it."""
    text = shortened(printable(name), _MOST_LETTERS).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

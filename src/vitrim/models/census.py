"""Which plain ViTs of timm can be reduced: every one is built without weights, and its first blocks run reduced.

    python -m vitrim.models.census docs/models.md

writes the table into a page. A ViT is plain if it attends, and works at one resolution and one width from the first
block to the last, as timm's `feature_info` states. A module of timm is passed over where its first model is none.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..errors import VitrimError
from ..text import with_written
from .finding import find_adapter
from .reduction.attach import attach
from .shapes_only import shapes_only
from .widths.sublayers import sublayers

REDUCTION = "ToMe() @ KeepRate(0.7, at=(1,))"


@dataclass(frozen=True, order=True)
class Verdict:
    """What an architecture takes.

    module: of timm. adapter: that reduces it; "" if none does. cls: whether it has a CLS token to score with.
    widths: whether its width can change. reason: why its tokens cannot be reduced; "" if they can.
    """

    module: str
    adapter: str = ""
    cls: bool = False
    widths: bool = False
    reason: str = ""

    def __str__(self) -> str:
        takes = ("attach", *(("CLS scores",) if self.cls else ()), *(("stratify",) if self.widths else ()))
        return f"{self.module}: {', '.join(takes) if not self.reason else 'refused'}"


def candidates() -> Iterator[tuple[str, str]]:
    """Architectures that timm itself defines, with their modules, sorted."""
    for name in timm.list_models():
        home = timm.model_entrypoint(name).__module__
        if home.startswith("timm.models."):
            yield name, home.removeprefix("timm.models.")


def verdict(name: str, module: str) -> Verdict | None:
    """The verdict on one architecture; None if it is not a plain ViT."""
    with shapes_only():
        model = timm.create_model(name).eval()
    if not _plain(model):
        return None
    try:
        adapter = find_adapter(model)
        found = Verdict(module, adapter.name, adapter.geometry(model).has_cls, _widths(model))
        _run(model)
    except VitrimError as error:
        return Verdict(module, reason=_half_a_line(str(error)))
    return found


def _plain(model: Any) -> bool:
    stages = list(getattr(model, "feature_info", None) or ())
    sizes = {(str(stage.get("reduction")), stage.get("num_chs")) for stage in stages}
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    return len(sizes) == 1 and any(part.startswith(("attn", "attns")) for part in parts)


def _run(model: Any) -> None:
    """Reduce the tokens in the second of three blocks, and check that as many leave each as the handle states."""
    lengths: list[int] = []
    blocks = find_adapter(model).blocks(model)
    holder: Any = next(module for module in model.modules() if list(module.children()) == list(blocks))
    del holder[3:]
    for block in blocks[:3]:
        block.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    with attach(model, REDUCTION) as handle, torch.no_grad():
        handle.adapter.predict(model, torch.empty(1, *handle.geometry.input_size, device="meta"))
        if tuple(lengths) != handle.token_counts or lengths[-1] >= lengths[0]:
            raise AssertionError(f"{lengths} tokens leave the blocks under {REDUCTION}, not {handle.token_counts}")


def _widths(model: nn.Module) -> bool:
    try:
        return bool(sublayers(model))
    except VitrimError:
        return False


def _half_a_line(message: str) -> str:
    return message.rpartition("cannot be reduced: ")[2].partition(";")[0]


def census() -> dict[str, Verdict]:
    """Verdicts by the names of all plain ViTs of timm."""
    found: dict[str, Verdict | None] = {}
    first: dict[str, str] = {}
    for name, module in candidates():
        if found.get(first.setdefault(module, name), name) is not None:
            found[name] = verdict(name, module)
    return {name: one for name, one in found.items() if one is not None}


def models_table(found: dict[str, Verdict]) -> str:
    """The census in Markdown: a table by timm module, and the names behind each of its verdicts."""
    total, reduced = Counter(v.module for v in found.values()), Counter(v.module for v in found.values() if v.adapter)
    lines = [
        f"timm {timm.__version__} builds {len(found)} plain ViTs; tokens of {sum(reduced.values())} can be reduced.",
        "",
        "| timm module | reduced | of | with CLS scores | with stratify | adapter, or why not |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for module in sorted(total, key=lambda module: (-reduced[module], module)):
        own = [one for one in found.values() if one.module == module]
        why = sorted({one.reason or f"`{one.adapter}`" for one in own})
        cls, widths = sum(one.cls for one in own), sum(one.widths for one in own)
        row = (f"`{module}`", reduced[module], total[module], cls, widths, "; ".join(why))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "### By name", ""]
    for one in sorted(set(found.values()), key=str):
        names = [name for name, other in found.items() if other == one]
        listed = ", ".join(f"`{name}`" for name in names)
        lines += [f"<details><summary>{one}, {len(names)}</summary>", "", listed, "", "</details>", ""]
    return "\n".join(lines)


def with_models_table(page: str, found: dict[str, Verdict]) -> str:
    """The text of a page with the census between its marks."""
    return with_written(page, "models", models_table(found))


def names_on(page: str) -> dict[str, str]:
    """What a page says of each architecture: its verdict as text, by name."""
    found: dict[str, str] = {}
    for row, names in re.findall(r"<summary>(.*), \d+</summary>\n\n(.*)\n", page):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), row)
    return found


if __name__ == "__main__":
    everything = census()
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_models_table(path.read_text(), everything))

"""Imports go downward only, in the order of `RANK`."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import vitrim

PACKAGE = Path(vitrim.__file__).parent
RANK = {
    "text": 0,
    "errors": 1,
    "budgets": 2,
    "tables": 2,
    "option_types": 2,
    "user_files": 2,
    "variables": 2,
    "notation": 2,
    "output": 2,
    "yaml_text": 2,
    "heartbeat": 2,
    "options": 3,
    "places": 4,
    "tokens": 3,
    "models": 4,
    "data": 5,
    "measure": 6,
    "elastic": 7,
    "distill": 7,
    "train": 8,
    "exporting": 9,
    "compression": 10,
    "study": 11,
    "showing": 12,
    "demo": 13,
    "verb_options": 4,
    "verb_help": 5,
    "arguments": 14,
    "verbs": 14,
    "cli": 15,
    "__main__": 16,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


ROOMS = {room: [path for path in FILES if room_of(path) == room] for room in dict.fromkeys(map(room_of, FILES))}


@cache
def imported(path: Path) -> list[tuple[int, str]]:
    """Line and absolute name of every module that the file imports, wherever in the file it does so."""
    return [*_imported(path)]


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    package = ["vitrim", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room: str) -> None:
    if room == "__init__":
        return
    assert room in RANK, f"{room} is no room of the design"
    faults = []
    for path in ROOMS[room]:
        for line, name in imported(path):
            parts = name.split(".")
            if parts[0] != "vitrim" or len(parts) == 1 or parts[1] in (room, "__version__"):
                continue
            other = parts[1]
            if other not in RANK:  # A name of the package itself, which stands above every room.
                if RANK[room] < RANK["demo"]:
                    faults.append(f"{path}:{line} imports {name}; import it from its own room")
            elif RANK[other] >= RANK[room]:
                faults.append(f"{path}:{line}: {room} may not import {name}")
    assert faults == []


PARTS = {"widths": 1, "reduction": 1, "families": 2, "files": 3, "variants": 4, "census": 4, "__init__": 5}
"""Parts of room `models`, from the port (0) upward: families use both ways to change a model, files know families."""


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "models"], ids=lambda path: path.stem)
def test_imports_inside_models_go_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE / "models").with_suffix("").parts[0]
    for line, name in imported(path):
        part = [*name.split("."), "", ""][2]
        if name.startswith("vitrim.models.") and part in PARTS and part != own:
            assert PARTS[part] < PARTS.get(own, 0), f"{path}:{line}: {own} may not import {name}"


def test_tokens_know_torch_alone() -> None:
    for path in (PACKAGE / "tokens").glob("*.py"):
        for line, name in imported(path):
            assert name.split(".")[0] not in ("timm", "torchvision", "transformers", "accelerate"), f"{path}:{line}"


def test_report_imports_no_torch() -> None:
    for path in (PACKAGE / "showing").glob("report*.py"):
        for line, name in imported(path):
            assert name.split(".")[0] not in ("torch", "timm", "torchvision"), f"{path}:{line} imports {name}"


def test_no_room_is_called_utils() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


FOREIGN = frozenset({
    "blocks", "head_drop", "head_dist", "num_classes", "num_features", "pretrained_cfg", "default_cfg", "patch_embed",
    "pos_embed", "cls_token", "num_prefix_tokens", "embed_dim", "global_pool", "attn_pool", "fc_norm", "norm_pre",
    "forward_features", "forward_head", "forward_intermediates", "get_classifier", "reset_classifier",
    "set_grad_checkpointing", "set_input_size", "grad_checkpointing", "pooler_output",
})  # fmt: skip
"""What belongs to the classes of other libraries: only families may read it."""
DOORS = ("timm.models", "timm.layers", "timm.data.config", "torchvision.models", "transformers")
"""Modules that only room `models` imports, since models come from them."""
NO_MODELS = frozenset({"transformers.TrainerCallback"})


def foreign_reads(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute of a foreign model that the source reads, by a dot or by its name as text."""
    tree = ast.parse(source)
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FOREIGN:
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            # `adapter.blocks(model)` is the port itself.
            if not own and not (node.attr == "blocks" and id(node) in calls):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            text = node.args[1]
            if isinstance(text, ast.Constant) and text.value in FOREIGN:
                yield node.lineno, str(text.value)


@pytest.mark.parametrize(
    "source",
    ["model.blocks[0]", "getattr(model, 'pretrained_cfg', {})", "hasattr(m, 'num_classes')", "x.y.forward_features(z)"],
)
def test_reading_a_foreign_model_is_found(source: str) -> None:
    assert [*foreign_reads(source)]
    assert not [*foreign_reads("adapter.blocks(model); self.num_classes; info.classes")]


@pytest.mark.parametrize("room", [room for room in ROOMS if RANK.get(room, 0) > RANK["models"]])
def test_only_the_port_reads_foreign_models(room: str) -> None:
    faults = []
    for path in ROOMS[room]:
        for line, name in foreign_reads(path.read_text()):
            faults.append(f"{path}:{line} reads {name} of a foreign model; use its adapter")
        for line, name in imported(path):
            if name.startswith(DOORS) and name not in NO_MODELS:
                faults.append(f"{path}:{line} imports {name}; models come through room models")
    assert faults == []


LONGEST = 250
"""Lines of a file: longer ones have more than one purpose."""
LONGER = {"models/adapter.py": 350}
"""The port, which is read as one protocol."""


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_has_one_purpose_and_so_few_lines(room: str) -> None:
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in ROOMS[room]}
    longer = {name: number for name, number in lines.items() if number > LONGER.get(name, LONGEST)}
    assert longer == {}, "divide these files where their purposes part"

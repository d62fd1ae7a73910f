"""What users get: names that are loaded when they are used, and their types."""

import ast
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree

import pytest

import vitrim
from vitrim.distill import TERMS, WEIGHTS
from vitrim.tokens import CURRICULA, REDUCERS, SCHEDULES

ROOT = Path(__file__).parents[1]


def test_every_entry_of_the_tables_is_a_name_of_the_package() -> None:
    for table in (REDUCERS, SCHEDULES, CURRICULA, TERMS, WEIGHTS):
        for name, entry in table.items():
            assert getattr(vitrim, name) is entry
            if entry.__module__.startswith("vitrim."):  # Not an entry that another test module has registered.
                assert name in vitrim.__all__
                assert name in dir(vitrim)


def test_type_checkers_see_every_name() -> None:
    tree = ast.parse((ROOT / "src" / "vitrim" / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    names = [alias.name for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == sorted(vitrim.__all__)
    for name in names:
        assert getattr(vitrim, name).__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    for name in ("Unknown", "unknown", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'vitrim' has no attribute '{name}'"):
            getattr(vitrim, name)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, vitrim, vitrim.cli; hasattr(vitrim, 'tokens_'); dir(vitrim); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_hides_a_name_of_the_package() -> None:
    """Importing vitrim.x puts the module into `vitrim`, in place of a function of that name."""
    assert not {module.name for module in pkgutil.iter_modules(vitrim.__path__)} & {*vitrim.__all__}


VERBS = ("bench", "compress", "export", "show", "stratify", "verify")
ROOMS = (
    "vitrim.cli, vitrim.compression, vitrim.elastic, vitrim.exporting, vitrim.measure.speed, vitrim.showing.pictures"
)


def test_verbs_are_functions_whatever_is_imported_first() -> None:
    """Each order in a process of its own, forked from one that has imported the libraries and nothing of vitrim."""
    code = f"""if 1:
    import os, sys, timm, torch, torchvision
    assert "vitrim" not in sys.modules
    for first in ("", "import vitrim.verbs.exporting, vitrim.verbs.showing, {ROOMS}"):
        if os.fork():
            assert os.wait()[1] == 0, first
            continue
        exec(first)
        import vitrim
        before = [getattr(vitrim, name) for name in {VERBS}]
        assert all(one.__doc__ and one.__module__.startswith("vitrim.") for one in before)
        import vitrim.verbs.exporting, vitrim.verbs.showing, {ROOMS}
        assert before == [getattr(vitrim, name) for name in {VERBS}]
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_types_and_the_templates(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.build_meta")
    copytree(ROOT / "src", tmp_path / "src", ignore=lambda *_: ["__pycache__", "vitrim.egg-info"])
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = "import setuptools.build_meta as build; print(build.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert "vitrim/py.typed" in held
    assert "vitrim/tokens/scores.py" in held
    assert any(name.startswith("vitrim/showing/templates/") for name in held)

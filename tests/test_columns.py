"""One vocabulary of columns: a key has one heading and one format in every table; and tables as files."""

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

import vitrim
from vitrim import demo
from vitrim.errors import CheckpointError, OutputError
from vitrim.measure import bench_table
from vitrim.measure.columns import COLUMNS, columns
from vitrim.measure.table import Column, Table
from vitrim.study import compare, curve_points, run_study

PACKAGE = Path(vitrim.__file__).parent
MAKERS = {"measure/columns.py", "measure/table.py", "measure/bench_table.py", "study/published.py", "study/sweep.py",
          "showing/runs.py"}  # fmt: skip
"""Where columns are made: of the vocabulary, of a file, or for keys that users or other columns name."""


def test_columns_are_defined_in_one_file():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        tables = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  and any(alias.name == "Column" for alias in node.names)]  # fmt: skip
        literal = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Column"
            and node.args and isinstance(node.args[0], ast.Constant)
        ]  # fmt: skip
        name = path.relative_to(PACKAGE).as_posix()
        if any("sqlalchemy" in module for module in tables) or name == "measure/columns.py":
            continue
        assert not literal, f"{name}:{literal} defines a column of its own; enter it in measure/columns.py"
        assert not tables or name in MAKERS | {"showing/figures.py"}, name


def test_every_table_takes_its_columns_from_the_vocabulary():
    for table in (compare.COLUMNS, curve_points.COLUMNS, run_study.COLUMNS, demo.COLUMNS, bench_table._COLUMNS):
        assert [COLUMNS[column.key] for column in table] == list(table)
    assert columns("gmacs", "model") == (COLUMNS["gmacs"], COLUMNS["model"])


def test_rows_of_comparisons_have_the_keys_that_settings_may_not_take():
    assert {column.key for column in compare.COLUMNS} <= {*compare.ROW_KEYS}


def test_quartiles_are_shown_in_the_format_of_their_column():
    row = {"ms": 2.0, "ms_low": 1.5, "ms_high": 2.25}
    assert COLUMNS["ms"].show(row) == "2.00 [1.50, 2.25]"
    assert COLUMNS["ms"].show({"ms": 2.0}) == "2.00"


def test_of_several_writers_of_one_new_table_one_succeeds(tmp_path: Path):
    path, barrier = tmp_path / "table.json", Barrier(4)

    def write(number: int) -> bool:
        table = Table(f"{number}", [Column("a", "a")], [{"a": number}])
        barrier.wait()
        try:
            table.write(path)
        except OutputError:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        written = list(threads.map(write, range(4)))
    assert written.count(True) == 1
    assert Table.read(path).title == f"{written.index(True)}"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"title": 1}', '{"columns": [{"x": 1}]}', "[" * 100_000])
def test_a_damaged_table_is_one_line(text: str, tmp_path: Path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        Table.read(tmp_path / "table.json")

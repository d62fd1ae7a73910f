"""One vocabulary of columns: a key has one heading and one format in every table."""

import ast
from pathlib import Path

import vitrim
from vitrim import demo
from vitrim.measure import bench_table
from vitrim.measure.columns import COLUMNS, columns
from vitrim.study import compare, curve_points, run_study

PACKAGE = Path(vitrim.__file__).parent
MAKERS = {"measure/columns.py", "measure/table.py", "measure/bench_table.py", "study/published.py", "study/sweep.py",
          "show/runs.py"}  # fmt: skip
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
        assert not tables or name in MAKERS | {"show/figures.py"}, name


def test_every_table_takes_its_columns_from_the_vocabulary():
    for table in (compare.COLUMNS, curve_points.COLUMNS, run_study.COLUMNS, demo.COLUMNS, bench_table._COLUMNS):
        assert [COLUMNS[column.key] for column in table] == list(table)
    assert columns("gmacs", "model") == (COLUMNS["gmacs"], COLUMNS["model"])


def test_rows_of_comparisons_have_the_keys_that_settings_may_not_take():
    assert {column.key for column in compare.COLUMNS} <= {*compare.ROW_KEYS}

"""The command as a user calls it, within the process of the tests."""

from typing import Any

import pytest

from vitrim.cli import main


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[Any, str, str]:
    """Exit code, standard output and standard error of a command."""
    code: Any = 0
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err

"""Environment variables that change how a command runs, checked before a library reads them.

The libraries themselves print a warning and go on, start so many threads that the process dies, or raise an error that
does not name the variable.
"""

import os
import re
from collections.abc import Mapping

from .errors import VitrimError

DATABASE = "VITRIM_DATABASE"
"""The database that the workers of a study share; unlike a command line, no other user of the machine can read it."""
MOST_THREADS = 1024
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_COUNTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""What torchrun and accelerate set for each of the processes that they start together."""
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_variables(variables: Mapping[str, str] = os.environ) -> None:
    """Check the variables that set numbers of threads and processes.

    Raises:
        VitrimError: one of them is not a number, or out of range, or one that several processes need is missing.
    """
    for name in _THREADS:
        parts = variables.get(name, "").split(",") if name == "OMP_NUM_THREADS" else [variables.get(name, "")]
        if any(part.strip() and not _whole(part, 1, MOST_THREADS) for part in parts):
            raise VitrimError(
                f"the environment variable {name} is {variables[name][:60]!r}; it must be a whole number, 1 to "
                f"{MOST_THREADS}, or not set"
            )
    for name in _COUNTS:
        least = 1 if name.endswith("SIZE") else 0
        if name in variables and not _whole(variables[name], least, 65_535):
            raise VitrimError(
                f"the environment variable {name} is {variables[name][:60]!r}; it must be a whole number, {least} or "
                "more; start processes with torchrun or accelerate launch, which set it"
            )
    if int(variables.get("WORLD_SIZE", "1")) > 1 and (missing := [name for name in _NEEDED if name not in variables]):
        raise VitrimError(
            f"the environment variable WORLD_SIZE is {variables['WORLD_SIZE']}, but {missing[0]} is not set; start "
            "processes with torchrun or accelerate launch, which set both"
        )


def _whole(text: str, least: int, most: int) -> bool:
    return re.fullmatch(r"\s*[0-9]{1,9}\s*", text) is not None and least <= int(text) <= most

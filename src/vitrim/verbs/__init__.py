"""What each verb of the command does: plain functions, whose signature and docstring are the options and the help.

torch is imported inside them, so that help is instant.
"""

from .comparing import bench, evaluate
from .compressing import compress
from .cutting import extract, stratify
from .exporting import export
from .showing import demo, list_names, report, show
from .sweeping import sweep
from .training import study, train
from .verifying import verify

VERBS = {
    "demo": demo, "show": show, "bench": bench, "eval": evaluate, "train": train, "sweep": sweep, "study": study,
    "stratify": stratify, "extract": extract, "compress": compress, "verify": verify, "export": export,
    "report": report, "list": list_names,
}  # fmt: skip

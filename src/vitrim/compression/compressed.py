"""What `vitrim.compress` returns, and how it is written to a folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models.files.store import save_with
from ..places import FILE as FOLDER
from ..places import here
from .certificate import FILE, TRIED, Certificate


@dataclass(frozen=True)
class Compressed:
    """A cheaper model in eval mode, ready to use, and its certificate."""

    model: nn.Module
    certificate: Certificate

    def __repr__(self) -> str:
        return f"Compressed({type(self.model).__name__}, {self.certificate!r})"

    def save(self, folder: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
        """Write the model, which `vitrim.load` brings back whole, and its certificate.

        Args:
            folder: made if it does not exist.
            overwrite: replace a model that is there already.
            extra: kept with the model, see `vitrim.save`.
        """
        certificate = self.certificate.in_folder(folder)

        def write(staged: Path) -> None:
            data: Any = certificate.source.get("data")
            relative = isinstance(data, dict) and not os.path.isabs(data.get("root") or os.sep)
            # The certificate itself names no place, so that it can be published.
            (staged / FOLDER).write_bytes(here().encode(errors="surrogateescape") if relative else b"")
            (staged / FILE).write_text(certificate.to_json() + "\n", encoding="utf-8")
            certificate.tried_table().write(staged / TRIED)

        return save_with(self.model, folder, write, overwrite=overwrite, **extra)

"""Files that other runtimes run: ONNX, torch.export and AOTInductor, compared with the model before they are kept."""

from .comparison import Agreement, compare
from .formats import FORMATS, Format
from .run import Exported, export

__all__ = ["FORMATS", "Agreement", "Exported", "Format", "compare", "export"]

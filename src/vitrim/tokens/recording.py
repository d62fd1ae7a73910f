"""Whether operations run, or are recorded into a graph that runs later."""

import torch


def recording() -> bool:
    """Whether operations are recorded (compile, export, trace): the graph must fit any number of images."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (torch documents it.)
    return tracing or torch.compiler.is_compiling()

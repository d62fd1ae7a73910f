"""Distillation: terms, live and cached teachers, and the module that a training loop calls."""

from ..models.outputs import ModelInfo, Output, Outputs, Wanted
from .cache import TeacherCache
from .distiller import Distilled, Distiller, student_grid
from .feature_terms import Cls, ClsStages, Merged, Tokens
from .losses import LOSSES
from .objective import TERMS, WEIGHTS, Term, Terms
from .prediction_terms import DistToken, Labels, Logits
from .teacher import Teacher

__all__ = [
    "LOSSES",
    "TERMS",
    "WEIGHTS",
    "Cls",
    "ClsStages",
    "DistToken",
    "Distilled",
    "Distiller",
    "Labels",
    "Logits",
    "Merged",
    "ModelInfo",
    "Output",
    "Outputs",
    "Teacher",
    "TeacherCache",
    "Term",
    "Terms",
    "Tokens",
    "Wanted",
    "student_grid",
]

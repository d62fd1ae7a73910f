"""Pure token reduction: scores, reducers, schedules, curricula. Works on tensors, without any model."""

from ..notation import render
from .assignment import Assignment, TokenState, take
from .budget_schedule import Budget
from .cluster import Cluster
from .curricula import Adaptive, Constant, CosineWarmup, Delayed, Polynomial
from .curriculum import CURRICULA, Curriculum, Figure
from .plan import SCHEDULES, Cut, Plan, Schedule, make_plan
from .reducers import REDUCERS, Reducer, ToMe, TopK
from .reduction import Reduction
from .schedules import ConstantR, Counts, KeepRate, PowerLaw, Stages
from .scores import SCORES, Evidence, Score, score

__all__ = [
    "CURRICULA",
    "REDUCERS",
    "SCHEDULES",
    "SCORES",
    "Adaptive",
    "Assignment",
    "Budget",
    "Cluster",
    "Constant",
    "ConstantR",
    "CosineWarmup",
    "Counts",
    "Curriculum",
    "Cut",
    "Delayed",
    "Evidence",
    "Figure",
    "KeepRate",
    "Plan",
    "Polynomial",
    "PowerLaw",
    "Reducer",
    "Reduction",
    "Schedule",
    "Score",
    "Stages",
    "ToMe",
    "TokenState",
    "TopK",
    "make_plan",
    "render",
    "score",
    "take",
]

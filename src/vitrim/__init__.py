"""vitrim makes any Vision Transformer cheaper (fewer tokens, less width, a better teacher) and says what it costs."""

from .measure.cost import Cost, cost
from .models import Handle, attach, attached
from .tokens import *

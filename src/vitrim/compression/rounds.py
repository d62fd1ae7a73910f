"""The rounds of a search: how many candidates each lets stay, and how many images it sees."""

ROUNDS = ((8, 4), (3, 4))
"""(part of the images that a round sees, part of the candidates that stay): one eighth and a quarter, ..."""
METHODS = 6
"""Reducers that are tried at every share of the width and in every shape; before, each is tried in a few."""
LAST = 6
"""Candidates that see all images."""
PURE = 2
"""Candidates without cut widths that always stay."""


def images_of_round(images: int, part: int) -> int:
    """How many of the images a round sees that is to see one of so many parts."""
    return min(images, max(8, images // part))

"""How tokens of a foreign model are reduced: exchanged classes, one pass with its trace, and the handle of it all."""

"""How the width of a foreign model changes: sub-layers that run narrower, what makes up for lost units, and slicing."""

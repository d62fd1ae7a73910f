"""Models on disk: files of weights from anywhere, descriptions, and what `save` writes and `load` reads."""

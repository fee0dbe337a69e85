"""potstill: pre-training distillation from offline teacher logits.

The rooms of the house are sub-packages (`potstill.storage`, `potstill.kernels`, ...); each is a folder in the root of
the repository, joined to this package by a link. Nothing is imported here, so that `import potstill` costs nothing.
"""

__version__ = "0.1.0"

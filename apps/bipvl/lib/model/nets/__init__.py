"""The networks. `build_model(task)` is the one place where sizes become modules."""

from lib.model.nets.bipvl import BiPVLSeg, Output, build_model
from lib.model.nets.text import TextAssets

__all__ = ["BiPVLSeg", "Output", "TextAssets", "build_model"]

"""MONAI Label inference tasks."""

from lib.infers.batch import BatchInfer
from lib.infers.bipvl import BiPVLInfer
from lib.infers.interactive import InteractiveInfer

__all__ = ["BatchInfer", "BiPVLInfer", "InteractiveInfer"]

"""MONAI Label inference tasks."""

from lib.infers.batch import BatchInfer
from lib.infers.bipvl import BiPVLInfer

__all__ = ["BatchInfer", "BiPVLInfer"]

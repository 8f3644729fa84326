"""MONAI Label inference tasks."""

from lib.infers.bipvl import BiPVLInfer

__all__ = ["BiPVLInfer"]

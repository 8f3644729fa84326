"""MONAI Label train tasks."""

from lib.trainers.bipvl import BiPVLTrain

__all__ = ["BiPVLTrain"]

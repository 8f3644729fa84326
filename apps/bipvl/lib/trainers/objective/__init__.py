"""What a training step reads, and what it minimises."""

from lib.trainers.objective.network import LOSSES, TrainingNetwork, of_classes, unwrapped
from lib.trainers.objective.wordings import ABSENT, Reading, Wordings

__all__ = ["ABSENT", "LOSSES", "Reading", "TrainingNetwork", "Wordings", "of_classes", "unwrapped"]

"""What a training step reads, and what it minimises."""

from lib.trainers.objective.network import LOSSES, TrainingNetwork, unwrapped
from lib.trainers.objective.wordings import ABSENT, Reading, Wordings

__all__ = ["ABSENT", "LOSSES", "Reading", "TrainingNetwork", "Wordings", "unwrapped"]

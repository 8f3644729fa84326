"""What is known about each case before anybody annotates it."""

from lib.activelearning.scoring.methods import CaseScoring, scoring_methods

__all__ = ["CaseScoring", "scoring_methods"]

"""Which case to annotate next."""

from lib.activelearning.strategies import strategies

__all__ = ["strategies"]

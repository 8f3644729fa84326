"""Drafting sentences and their wordings with a language model behind an OpenAI-compatible Chat Completions endpoint.

The endpoint gets the names of the classes, what the task file says of them, and for wordings their sentences; never
anything of a patient. Finished classes are kept, so that a stopped run continues where it stopped.
"""

from lib.tasks.generate.drafter import Drafter, EndpointError
from lib.tasks.generate.file import Outcome, draft_file, remaining, without_text
from lib.tasks.generate.prompts import WRITTEN, Malformed, class_sentence

__all__ = [
    "Drafter",
    "EndpointError",
    "Malformed",
    "Outcome",
    "WRITTEN",
    "class_sentence",
    "draft_file",
    "remaining",
    "without_text",
]

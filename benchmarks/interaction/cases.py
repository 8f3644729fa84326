"""Cases as a server has them when somebody clicks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.accuracy.data import Preprocessed
from lib.model.nets import BiPVLSeg
from lib.tasks import Task
from lib.trainers.refiner.cases import Segmented, segmented


def prepare(model: BiPVLSeg, task: Task, cases: Sequence[dict[str, str]], volumes: Preprocessed) -> Iterator[Segmented]:
    """Segment each case once and keep what a session keeps."""
    model.eval()
    for case, data in zip(cases, volumes, strict=True):
        yield segmented(model, task, case, data["image"])

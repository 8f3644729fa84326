"""What makes a case worth annotating: one pure function per strategy, from what one forward pass tells about each case.

Every function takes the cases to choose from and those that need no more annotating (labelled, or in somebody's hands),
and returns a value for each case to choose from; the case with the largest is annotated next. No torch, no monailabel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from lib.activelearning.scoring.cache import CaseScores

Ranking = Callable[[Sequence[CaseScores], Sequence[CaseScores]], np.ndarray]


def uncertainty(cases: Sequence[CaseScores], known: Sequence[CaseScores]) -> np.ndarray:
    """Predictive entropy over the foreground: where the model itself does not know."""
    return np.array([case.entropy for case in cases])


def disagreement(cases: Sequence[CaseScores], known: Sequence[CaseScores]) -> np.ndarray:
    """(1 - cosine) / 2 of what the text says and the vision sees, 0 to 1: low alignment."""
    return np.array([(1 - case.alignment) / 2 for case in cases])


def distance(cases: Sequence[CaseScores], known: Sequence[CaseScores]) -> np.ndarray:
    """Euclidean distance of V_4 to the nearest known case, 0 to 2: greedy k-center (Gonzalez 1985; for active learning
    Sener and Savarese, ICLR 2018). If nothing is known yet, 2 less the mean distance to the others: the most typical
    case is the first centre."""
    vectors = np.stack([case.vector for case in cases])
    if not known:
        return 2 - cdist(vectors, vectors).mean(1)
    return cdist(vectors, np.stack([case.vector for case in known])).min(1)


def combined(cases: Sequence[CaseScores], known: Sequence[CaseScores]) -> np.ndarray:
    """Mean of the ranks by uncertainty, disagreement and distance, each 0 (last) to 1 (first); equals share a rank.

    The three have different units, and how far each of them varies changes from version to version: ranks need no
    weights that would have to be tuned on labels nobody has yet, and a quantity that does not tell the cases apart
    gives all of them the same rank and drops out.
    """
    parts = [part(cases, known) for part in (uncertainty, disagreement, distance)]
    return np.mean([(rankdata(part) - 1) / max(len(cases) - 1, 1) for part in parts], axis=0)


RANKINGS: dict[str, Ranking] = {
    "uncertainty": uncertainty,
    "alignment": disagreement,
    "diverse": distance,
    "combined": combined,
}


def choose(
    ranking: Ranking, cases: Mapping[str, CaseScores], known: Sequence[CaseScores], count: int = 1
) -> list[tuple[str, float]]:
    """The cases to annotate next and their values, one after the other: a chosen case is known for the next choice.

    The order of `cases` does not matter; of equal values the id that comes first is chosen.
    """
    left, known = dict(sorted(cases.items())), list(known)
    chosen: list[tuple[str, float]] = []
    while left and len(chosen) < count:
        values = ranking(list(left.values()), known)
        best = int(np.argmax(values))  # the first of equals
        name = list(left)[best]
        chosen.append((name, float(values[best])))
        known.append(left.pop(name))
    return chosen

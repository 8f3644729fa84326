"""Which words a training step reads: one of several wordings of each sentence, some with a typing error, some sentences
left out, and beside or in place of the classes texts of what the image does not show.

A network that always reads the same sentences tells them apart like a checksum: any other words for the same structure
are strange to it, and often taken for the other class (docs/research/text.md). One that reads many, from a pre-trained
encoder, learns what they have in common; and one that also reads texts of what is not there learns to find nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.model.nets.text import Sentences, StageDividedBert
from lib.tasks import ATTRIBUTES, Task
from lib.tasks.absent import absent_texts
from lib.tasks.wording import MIRROR, exchanged, exchanged_rows, misspelt

ABSENT = -1  # number of a class that no voxel shows
BESIDE = 2  # at most so many texts of absent classes beside those of all classes
MISSPELT = 2  # copies of each sentence with a typing error
NAME = "class"  # the attribute that names the class
NAMING = ATTRIBUTES.index(NAME)
NAME_ALONE = 1 / 3  # of the steps that leave sentences out
SEED = 0  # of the typing errors, which are made once


@dataclass(frozen=True)
class Reading:
    """What a step reads. classes: the number of the task's class that each text describes; `ABSENT` for none."""

    sentences: Sentences
    classes: Tensor
    mirrored: bool = False


class Wordings:
    """The sentences that the training steps of a task draw from.

    A step draws, each by its setting of `training`: whether the patient is mirrored (`mirror`), which classes it knows
    (`drop_classes`), which concepts it reads (`drop_concepts`; never so few that two classes read the same), a wording
    of each sentence (`vary_wording`), typing errors (`typing_errors`), and absent texts (`absent`): beside the classes
    in half of these steps, and in place of some or all of them in the others.

    What was drawn stays for `text_interval` steps, as the reading of it does.

    The order of a class's sentences is not shuffled: the network reads them as a set, its outputs do not depend on it.

    Args:
        task: with the text head.
        text: the encoder; it tokenises.
    """

    def __init__(self, task: Task, text: StageDividedBert) -> None:
        self.recipe, self.text, self.share = task.training, text, task.vary_wording
        self.rows = task.text_rows()
        self.bank: Sentences | None = None
        self.held: Reading | None = None  # of the last step
        self.mirrored = self._mirrored(self.rows) if task.training.mirror else None
        if task.varied:
            self._fill(task)

    def _mirrored(self, rows: list[list[str]]) -> Sentences | None:
        """The task's text for a mirrored patient; None for sentences that name no side, which are read once."""
        mirrored = self.text.tokenize(exchanged_rows(rows, *MIRROR))
        return mirrored if mirrored.key != self.text.key else None

    def _fill(self, task: Task) -> None:
        """Tokenise every sentence that a step may draw, each once."""
        draw, numbers = random.Random(SEED), {}  # type: ignore[var-annotated]

        def place(sentence: str) -> int:
            return numbers.setdefault(sentence, len(numbers))

        def places(sentence: str) -> list[list[int]]:
            """The sentence and its misspelt copies; for a mirrored patient likewise."""
            copies = [
                sentence,
                *(misspelt(sentence, draw) for _ in range(MISSPELT if self.recipe.typing_errors else 0)),
            ]
            sides = copies, [exchanged(copy, *MIRROR) for copy in copies] if self.mirrored else copies
            return [[place(copy) for copy in side] for side in sides]

        texts = [(name, task.concepts.classes[name]) for name in task.classes]
        # The bare name is a wording too: it is what people type first.
        worded = [[(*text.trained(a), *([name] if a == NAME else [])) for a in ATTRIBUTES] for name, text in texts]
        self.worded = [[[places(w) for w in wordings] for wordings in of_class] for of_class in worded]
        absent = absent_texts(task) if self.recipe.absent else None
        self.structures = [[place(s) for s in sentences] for sentences in absent.structures] if absent else []
        self.ordinary = [place(s) for s in absent.ordinary] if absent else []
        self.bank = self.text.tokenize([[sentence] for sentence in numbers])

    def draw(self) -> Reading:
        """The text of the next step. Its random numbers come from torch's generator, which a resumed round restores."""
        recipe, count = self.recipe, len(self.rows)
        mirror = bool(torch.rand(()) < recipe.mirror)
        classes = _some(torch.arange(count), recipe.drop_classes)
        concepts = self._concepts()
        if self.bank is None:
            sentences = self.text.some(classes, concepts, self.mirrored if mirror else None)
            return Reading(sentences, classes, mirror)
        if self.held and self.text.lasts(self.held.sentences):
            return self.held
        if torch.rand(()) < recipe.absent:
            classes = self._with_absent(classes)
        attributes = concepts.tolist()
        # Half of the lone names stand in the place of every sentence, as in a request of who knows nothing more.
        if attributes == [NAMING] and torch.rand(()) < 0.5:
            concepts, attributes = torch.arange(len(self.rows[0])), [NAMING] * len(self.rows[0])
        vary = bool(torch.rand(()) < self.share)
        drawn = [
            self._absent(attributes) if n == ABSENT else self._text(n, attributes, vary, mirror)
            for n in classes.tolist()
        ]
        self.held = Reading(self._sentences(drawn, concepts), classes, mirror)
        return self.held

    def _concepts(self) -> Tensor:
        """Some of the concepts, or all: two classes with the same sentences about some of them need the others. In a
        third of the steps that leave some out the name alone is left: what is asked for most often is a name."""
        every = torch.arange(len(self.rows[0]))
        some = _some(every, self.recipe.drop_concepts)
        if self.bank is not None and len(some) < len(every) and torch.rand(()) < NAME_ALONE:
            some = torch.tensor([NAMING])
        read = [tuple(sentences[k] for k in some.tolist()) for sentences in self.rows]
        return some if len(set(read)) == len(read) else every

    @staticmethod
    def _with_absent(classes: Tensor) -> Tensor:
        """Absent classes beside the others, or in place of some or all of them."""
        if torch.rand(()) < 0.5:
            return torch.cat([classes, torch.full((_below(BESIDE) + 1,), ABSENT)])
        replaced = torch.randperm(len(classes))[: _below(len(classes)) + 1]
        return classes.index_fill(0, replaced, ABSENT)

    def _text(self, n: int, attributes: Sequence[int], vary: bool, mirror: bool) -> list[int]:
        """A wording of each attribute of a class; of one that stands for all, the same for all."""
        found = {k: self._wording(n, k, vary, mirror) for k in dict.fromkeys(attributes)}
        return [found[k] for k in attributes]

    def _wording(self, n: int, k: int, vary: bool, mirror: bool) -> int:
        wordings = self.worded[n][k]
        copies = wordings[_below(len(wordings)) if vary else 0][int(mirror)]
        wrong = len(copies) > 1 and bool(torch.rand(()) < self.recipe.typing_errors)
        return copies[1 + _below(len(copies) - 1) if wrong else 0]

    def _absent(self, attributes: Sequence[int]) -> list[int]:
        """A structure, sentences of several structures, ordinary sentences, or one of any kind again and again."""
        kind = _below(4)
        structure = self.structures[_below(len(self.structures))]
        if kind == 0:
            return [structure[k] for k in attributes]
        if kind == 1:
            return [self.structures[_below(len(self.structures))][k] for k in attributes]
        if kind == 2:
            return [self.ordinary[_below(len(self.ordinary))] for _ in attributes]
        one = structure[0] if torch.rand(()) < 0.5 else self.ordinary[_below(len(self.ordinary))]
        return [one] * len(attributes)

    def _sentences(self, drawn: Sequence[Sequence[int]], concepts: Tensor) -> Sentences:
        assert self.bank is not None
        rows = torch.tensor(drawn).flatten()
        some = concepts if len(concepts) < len(self.rows[0]) else None
        key = f"{self.bank.key}:{drawn}:{concepts.tolist()}"
        # A frozen encoder reads the bank once, any other what was drawn.
        found = Sentences(self.bank.ids[rows], self.bank.mask[rows], key, len(drawn), concepts=some)
        return replace(found, rows=rows, whole=self.bank) if self.text.frozen else found


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _some(numbers: Tensor, share: float) -> Tensor:
    """All of the numbers, or in a `share` of the calls a random subset of random size, never empty, in order."""
    if len(numbers) == 1 or torch.rand(()) >= share:
        return numbers
    size = int(torch.randint(1, len(numbers), ()))
    return numbers[torch.randperm(len(numbers))[:size].sort().values]

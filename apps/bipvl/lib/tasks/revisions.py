"""Revisions of a task's sentences: what was saved on the concept page, beside the task's versions.

    model/<task>/concepts/r0001.json, r0002.json, …    never rewritten, never removed

Revision 0 is the task's concepts file. The next training round reads the newest revision; a published version
keeps the sentences that it was trained with. Each file is whole at every instant.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from lib.files import now, numbered, write_json
from lib.tasks import ATTRIBUTES, ClassText, Concepts, Review, Task, TaskError, meant
from lib.tasks.check import MAX_WORDINGS
from lib.tasks.wording import markup

logger = logging.getLogger(__name__)

FOLDER = "concepts"
LOCK_SECONDS = 60
MAX_NOTE = 200


class Conflict(TaskError):
    """Somebody else has saved in between."""

    status = 409


class Revision(BaseModel):
    """One saved text.

    base: the revision that it was made from. file, wordings: hashes of the concepts file at that time, of its sentences
    and of their wordings. who: the account.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    base: int
    time: str
    who: str
    note: str
    file: str
    wordings: str = ""
    concepts: Concepts


class Revisions:
    """The revisions of one task. Safe to use from several threads and processes at once.

    Args:
        task: as its files describe it.
        model_dir: the task's folder of versions.
    """

    def __init__(self, task: Task, model_dir: Path) -> None:
        self.task = task
        self.folder = model_dir / FOLDER

    def numbers(self) -> list[int]:
        """Revisions there are, oldest first; without 0, which is the file."""
        return numbered(self.folder, "r", "json")

    @property
    def newest(self) -> int:
        """The number of the text that the next round reads; 0 for the file."""
        return max(self.numbers(), default=0)

    @property
    def file_changed(self) -> bool:
        """True if the concepts file is not what it was when the newest revision was saved, or nobody can say."""
        if not (newest := self.newest):
            return False
        try:
            saved, own = self.read(newest), self.task.concepts
        except TaskError:  # damaged
            return True
        return (saved.file, saved.wordings) != (own.hash, own.wordings_hash)

    def read(self, number: int) -> Revision:
        """A revision as it was saved.

        Raises:
            TaskError: there is none of this number, or its file is damaged.
        """
        if number == 0:
            concepts = self.task.concepts
            hashes = {"file": concepts.hash, "wordings": concepts.wordings_hash}
            return Revision(number=0, base=0, time="", who="", note="", **hashes, concepts=concepts)
        path = self.folder / f"r{number:04d}.json"
        try:
            return Revision.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            valid = ", ".join(map(str, [0, *self.numbers()]))
            raise TaskError(f"concepts of {self.task.name}: no revision {number}; valid are {valid}") from None
        except (OSError, ValidationError) as error:
            raise TaskError(f"{path}: damaged: {str(error).splitlines()[0]}; restore it from a backup") from error

    def text(self, number: int) -> Task:
        """The task with a revision's sentences: for the classes that the task has by now. A class that the revision
        does not know keeps the file's, and then nobody has reviewed the whole."""
        saved, own = self.read(number).concepts, self.task.concepts
        if number == 0:
            return self.task
        spoken = {name: saved.classes[said] for name in own.classes if (said := meant(name, saved.classes))}
        missing = [name for name in own.classes if name not in spoken]
        if missing:
            logger.warning(
                "%s: revision %d has no sentences for %s: the file's are used",
                *(self.task.name, number, ", ".join(missing)),
            )
        classes = {name: spoken.get(name, text) for name, text in own.classes.items()}
        review = Review(status="unreviewed") if missing else saved.review
        concepts = Concepts(modality=own.modality, review=review, classes=classes)
        return self.task.model_copy(update={"concepts": concepts})

    def save(self, text: Task, base: int, who: str, note: str) -> int:
        """Keep a text as the next revision, made from revision `base`. Returns its number.

        Raises:
            Conflict: `base` is not the newest any more.
            TaskError: nothing is different, or the note is not short plain text.
        """
        if len(note) > MAX_NOTE or not note.isprintable():
            raise TaskError(f"note: one line of at most {MAX_NOTE} characters")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=LOCK_SECONDS):
            newest = self.newest
            if base != newest:
                raise Conflict(
                    f"revision {newest} was saved in the meantime, and yours is made from revision {base}; nothing was "
                    "changed"
                )
            if self._same(newest, text):
                raise TaskError(
                    f"nothing to save: the text is that of {f'revision {newest}' if newest else 'the file'}"
                )
            number = newest + 1
            revision = Revision(
                number=number,
                base=base,
                time=now(),
                who=who,
                note=note,
                file=self.task.concepts.hash,
                wordings=self.task.concepts.wordings_hash,
                concepts=text.concepts,
            )
            write_json(self.folder / f"r{number:04d}.json", revision.model_dump(mode="json"))
        logger.info("%s: revision %d of the sentences saved by %r", self.task.name, number, who)
        return number

    def _same(self, number: int, text: Task) -> bool:
        try:
            return self.read(number).concepts == text.concepts
        except TaskError:  # damaged: whatever is saved now is better
            return False

    def history(self) -> list[dict[str, Any]]:
        """What is known of each revision, the newest first, the file last; `damaged` says why one cannot be read."""
        found = []
        for number in [*reversed(self.numbers()), 0]:
            try:
                revision = self.read(number)
            except TaskError as error:
                found.append({"number": number, "damaged": str(error)})
                continue
            concepts = revision.concepts
            found.append(
                {
                    **revision.model_dump(mode="json", exclude={"concepts"}),
                    "hash": concepts.hash,
                    "review": concepts.review.model_dump(),
                }
            )
        return found


def with_wordings(text: Task, override: dict[str, dict[str, list[str]]]) -> Task:
    """The task with other wordings of some sentences (class → attribute → wordings); an empty list removes them.
    `Task.with_concepts` does the same for the sentences.

    Raises:
        TaskError: unknown class or attribute, one wording alone or too many, an empty one, or markup in one.
    """
    classes = dict(text.concepts.classes)
    for given, attributes in override.items():
        name = meant(given, classes)
        if name is None:
            raise TaskError(f"variants: unknown class {given!r}; valid are {', '.join(classes)}")
        own = classes[name]
        variants = {attribute: wordings for attribute, wordings in own.variants.items() if attribute not in attributes}
        for attribute, listed in attributes.items():
            where = f"variants.{name}.{attribute}"
            if len(listed) > MAX_WORDINGS:
                raise TaskError(f"{where}: {len(listed)} wordings; a sentence has at most {MAX_WORDINGS}")
            for number, wording in enumerate(listed, 1):
                if found := markup(wording.strip()):
                    raise TaskError(f"{where}: wordings are plain text; found {found} in wording {number}")
            if listed or attribute not in ATTRIBUTES:
                variants[attribute] = tuple(wording.strip() for wording in listed)
        try:
            classes[name] = ClassText(sentences=own.sentences, variants=variants, ambiguous=own.ambiguous)
        except ValidationError as error:
            raise TaskError(f"variants.{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return text.model_copy(update={"concepts": text.concepts.model_copy(update={"classes": classes})})


def newest_text(task: Task, model_dir: Path) -> Task:
    """The task with the sentences that a round reads now: those of the newest revision, else of the file.

    Raises:
        TaskError: the newest revision is damaged. No older one takes its place in silence.
    """
    revisions = Revisions(task, model_dir)
    return revisions.text(revisions.newest)

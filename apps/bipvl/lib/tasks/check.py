"""What makes the sentences of a task usable: one function per rule, one `Problem` per finding.

`Task` already refuses what nothing can be computed with (a class without text, a missing attribute). The rules here are
about wording: sentences describe what is visible in the image, tell the classes apart, state sides and fit the
tokenizer. Further wordings of a sentence keep the same rules, except that those of `class` need not name the class and
the modality; a finding calls them `shape wording 2`. The module imports neither torch nor monailabel; the tokenizer
comes in as a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lib.tasks import ATTRIBUTES, ClassText, Task
from lib.tasks.wording import markup

MAX_CHARACTERS = 400  # of a sentence; those that ship have at most 135
MAX_WORDINGS = 20  # of a sentence, that a command drafts or a page saves


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# What an organ does cannot be seen in an image. Every form is listed, so that the list says exactly what it refuses.
FUNCTIONAL_WORDS = tuple(
    _words("""
    function functions functional functioning functionally pump pumps pumped pumping filter filters filtered
    filtering filtration produce produces produced producing production store stores stored storing storage digest
    digests digested digesting digestion digestive supply supplies supplied supplying drain drains drained
    draining drainage secrete secretes secreted secreting secretion excrete excretes excreted excreting excretion
    absorb absorbs absorbed absorbing absorption deliver delivers delivered delivering transport transports
    transported transporting regulate regulates regulated regulating regulation metabolism metabolic metabolize
    metabolizes detoxify detoxifies hormone hormones hormonal circulate circulates circulating circulation
    contractile contraction contractions oxygenate oxygenated deoxygenated responsible
    """)
)

# Words that judge instead of describing. The model sees no diagnosis, and a sentence must stay true for every patient.
DIAGNOSTIC_WORDS = tuple(
    _words("""
    normal normally abnormal abnormally abnormality abnormalities healthy unhealthy disease diseases diseased
    disorder disorders pathology pathologic pathological pathologically suspicious suspected suspicion benign
    malignant malignancy malignancies cancer cancers cancerous carcinoma carcinomas tumor tumors tumour tumours
    neoplasm neoplasms neoplastic glioma gliomas glioblastoma metastasis metastases metastatic lesion lesions
    edema oedema necrosis necrotic infarct infarcts infarction ischemia ischemic ischaemia ischaemic inflammation
    inflammatory inflamed infection infected cirrhosis cirrhotic stenosis thrombus thrombosis hemorrhage
    hemorrhagic haemorrhage atrophy atrophic hypertrophy hypertrophic diagnose diagnosed diagnosis diagnostic
    prognosis symptom symptoms syndrome
    """)
)

STATUSES = ("draft", "unreviewed", "reviewed")
_SIDES = {"left": "right", "right": "left"}
_SIDED_ATTRIBUTES = ("class", "location")
_SPECIAL_TOKENS = 2  # [CLS] and [SEP]


@dataclass(frozen=True)
class Problem:
    """One broken rule. `class_name`, `attribute` and `sentence` are empty if the rule concerns the whole file;
    `fatal`: with it the text cannot be used, while the others are advice on wording."""

    class_name: str
    attribute: str
    sentence: str
    message: str
    fatal: bool = False

    def __str__(self) -> str:
        where = ".".join(part for part in (self.class_name, self.attribute) if part) or "concepts"
        return f"{where}: {self.message}" + (f" in {self.sentence!r}" if self.sentence else "")


def check(task: Task, count_tokens: Callable[[str], int] | None = None, max_tokens: int = 512) -> list[Problem]:
    """All problems of a task's sentences; an empty list if there is none.

    Args:
        task: the task with its concepts.
        count_tokens: tokens of a text, [CLS] and [SEP] included; without it `estimate_tokens` is used.
        max_tokens: the tokenizer's limit for one text (BERT: 512).

    Returns:
        The problems, file-wide ones first, then rule by rule in the order of the classes, wordings after sentences.
    """
    count = count_tokens or estimate_tokens
    return [
        *_review(task),
        *_attributes(task),
        *_markup(task),
        *_wording(task),
        *_length(task, count, max_tokens),
        *_class_sentence(task),
        *_sides(task),
        *_duplicates(task),
        *_ambiguous(task),
    ]


def estimate_tokens(text: str) -> int:
    """A high estimate of a text's WordPiece tokens, for use without a tokenizer: one token for every two letters begun
    of each word, one for each other sign, and two special tokens. English vocabularies keep most words whole, so real
    counts are lower. (The strict bound, one token per character, would refuse nearly every definition.)
    """
    return _SPECIAL_TOKENS + sum((len(part) + 1) // 2 for part in re.findall(r"\w+|[^\w\s]", text))


def _texts(task: Task) -> Iterator[tuple[str, ClassText]]:
    for name in task.classes:
        yield name, task.concepts.classes[name]


def _sentences(task: Task) -> Iterator[tuple[str, str, str]]:
    """Class, attribute and sentence of everything that is written about a class, ambiguous sentences included. The
    further wordings come last: of two equal texts it is the wording that is at fault."""
    for name, text in _texts(task):
        for attribute, sentence in text.sentences.items():
            yield name, attribute, sentence
        for number, sentence in enumerate(text.ambiguous, 1):
            yield name, f"ambiguous {number}", sentence
    for name, text in _texts(task):
        for attribute, wordings in text.variants.items():
            for number, wording in enumerate(wordings, 1):
                yield name, worded(attribute, number), wording


def worded(attribute: str, number: int) -> str:
    """What a finding, a table and a page call a further wording of a sentence, counted from 1.

    >>> worded("shape", 2)
    'shape wording 2'
    """
    return f"{attribute} wording {number}"


def _contains(sentence: str, phrase: str) -> bool:
    """True if the words of the phrase stand in the sentence in one run, whatever their case."""
    words = re.escape(phrase.lower()).replace(r"\ ", r"\s+")
    return re.search(rf"(?<!\w){words}(?!\w)", sentence.lower()) is not None


def _review(task: Task) -> Iterator[Problem]:
    review = task.concepts.review
    if review.status not in STATUSES:
        yield Problem("", "review", "", f"status {review.status!r}; valid are {', '.join(STATUSES)}")
    elif review.status == "reviewed" and not (review.by and review.date):
        yield Problem("", "review", "", "status 'reviewed' needs by and date")


def _attributes(task: Task) -> Iterator[Problem]:
    for name, text in _texts(task):
        for attribute in ATTRIBUTES:
            if not text.sentences.get(attribute, "").strip():
                yield Problem(name, attribute, "", f"no sentence; every class has {', '.join(ATTRIBUTES)}", True)
        for attribute in text.sentences:
            if attribute not in ATTRIBUTES:
                yield Problem(name, attribute, "", f"unknown attribute; valid are {', '.join(ATTRIBUTES)}", True)


def _markup(task: Task) -> Iterator[Problem]:
    for name, attribute, sentence in _sentences(task):
        if found := markup(sentence):
            yield Problem(name, attribute, sentence, f"sentences are plain text; found {found}", True)


def _wording(task: Task) -> Iterator[Problem]:
    # A class may be called "enhancing tumor": its name is how the structure is addressed, not a judgement.
    own = {word for name in (*task.classes, *task.labels) for word in _words(name)}
    kinds = {word: "functional" for word in FUNCTIONAL_WORDS} | {word: "diagnostic" for word in DIAGNOSTIC_WORDS}
    for name, attribute, sentence in _sentences(task):
        for word in dict.fromkeys(_words(sentence)):
            if word in kinds and word not in own:
                yield Problem(name, attribute, sentence, f"{kinds[word]} word {word!r}; describe what is visible")


def _length(task: Task, count: Callable[[str], int], max_tokens: int) -> Iterator[Problem]:
    definitions = ((name, "definition", " ".join(text.sentences.values())) for name, text in _texts(task))
    for name, attribute, sentence in _sentences(task):
        if len(sentence) > MAX_CHARACTERS:
            yield Problem(
                name, attribute, "", f"{len(sentence)} characters; a sentence has at most {MAX_CHARACTERS}", True
            )
    for name, attribute, sentence in (*_sentences(task), *definitions):
        tokens = count(sentence)
        if tokens > max_tokens:
            yield Problem(name, attribute, sentence, f"{tokens} tokens; the limit is {max_tokens}", True)


def _class_sentence(task: Task) -> Iterator[Problem]:
    modality = task.concepts.modality
    if modality != task.modality:
        yield Problem("", "modality", "", f"sentences for {modality!r}, but the task's modality is {task.modality!r}")
    for name, text in _texts(task):
        sentence = text.sentences.get("class", "")
        for what, phrase in (("class name", name), ("modality", modality)):
            if not _contains(sentence, phrase):
                yield Problem(name, "class", sentence, f"the {what} {phrase!r} is missing")


def _sides(task: Task) -> Iterator[Problem]:
    """Left or right must be stated if the class has a twin, in the task or by its DICOM laterality."""
    structures = task.regions if task.regions is not None else task.labels
    for name, text in _texts(task):
        words = _words(name)
        laterality = structures[name].snomed.laterality
        side: str | None = laterality or next((word for word in words if word in _SIDES), None)
        twin = [_SIDES.get(word, word) for word in words]
        has_twin = laterality is not None or any(twin == _words(other) for other in task.classes)
        if side is None or not has_twin:
            continue
        for attribute in _SIDED_ATTRIBUTES:
            wordings = enumerate(text.variants.get(attribute, ()), 1)
            numbered = ((worded(attribute, number), wording) for number, wording in wordings)
            for place, sentence in ((attribute, text.sentences.get(attribute, "")), *numbered):
                if not _contains(sentence, side):
                    yield Problem(name, place, sentence, f"the side {side!r} is missing")


def _duplicates(task: Task) -> Iterator[Problem]:
    """Two classes whose sentences differ in nothing but the class name cannot be told apart by them, and a wording that
    only repeats teaches nothing. The attribute `class` is compared as it stands, because the name is all that differs
    there."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, attribute, sentence in _sentences(task):
        if not sentence.strip():
            continue  # missing, not repeated
        # Position says nothing among ambiguous sentences, nor among wordings.
        group, kind = (*attribute.split(), "")[:2]
        words = " ".join(_words(sentence))
        if group != "class":
            words = re.sub(rf"\b{re.escape(' '.join(_words(name)))}\b", "", words)
            words = " ".join(words.split())
        first, place = seen.setdefault((group, words), (name, attribute))
        if first != name:
            yield Problem(name, attribute, sentence, f"the same sentence as class {first!r}")
        elif kind == "wording" and place != attribute:
            other = "the sentence itself" if place == group else place.removeprefix(f"{group} ")
            yield Problem(name, attribute, sentence, f"the same as {other}")


def _ambiguous(task: Task) -> Iterator[Problem]:
    counts = {name: len(text.ambiguous) for name, text in _texts(task)}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in counts.items())
        yield Problem("", "ambiguous", "", f"every class needs the same number of sentences, or none: {listed}")

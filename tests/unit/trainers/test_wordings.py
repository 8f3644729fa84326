"""What a training step reads: wordings, typing errors, left-out sentences, and texts of what is not there."""

import random

import pytest
import torch

from lib.model.nets import build_model
from lib.tasks import ATTRIBUTES, ClassText, load_task
from lib.tasks.absent import absent_texts
from lib.tasks.wording import misspelt
from lib.trainers.objective import ABSENT, TrainingNetwork, of_classes
from lib.trainers.objective.wordings import NAME
from support.helpers import concepts, tiny_overlapping_task, tiny_task

PATCH = (64, 32, 32)
STEPS = 300
MODEL = {
    **{"vision": "unet", "feature_size": 4, "head": "text"},
    "scratch": {"layers": 4, "width": 16, "heads": 2, "max_tokens": 256},  # absent texts fall into letters
}


def task_for(make=tiny_task, **training):
    """Every attribute of every class has two further wordings; the second is kept aside."""
    task = make(patch=PATCH, model=MODEL)
    said = concepts(list(task.classes), task.modality)
    for name in task.classes:
        said["classes"][name]["variants"] = {a: [f"{a} of {name} again", f"{a} of {name} aside"] for a in ATTRIBUTES}
    return make(patch=PATCH, model=MODEL, training={"vary_wording": 1.0, **training}, concepts=said)


def network_for(task):
    torch.manual_seed(0)
    return TrainingNetwork(build_model(task), task).train()


def drawn(network, steps=STEPS):
    """What `steps` steps read: for each the classes, and the sentences of each text."""
    tokenizer = network.model.text.tokenizer
    found = []
    for _ in range(steps):
        reading = network.wordings.draw()
        ids = reading.sentences.ids
        said = [tokenizer.decode(i[m].tolist()) for i, m in zip(ids, reading.sentences.mask, strict=True)]
        width = len(said) // len(reading.classes)
        found.append((reading, [said[i : i + width] for i in range(0, len(said), width)]))
    return found


def letters(sentence):
    """Without what a tokenizer adds and takes away."""
    return "".join(c for c in sentence.removeprefix("[CLS]").removesuffix("[SEP]").lower() if c.isalnum())


def test_each_wording_is_drawn_as_often_but_the_one_kept_aside():
    network = network_for(task_for())
    steps = drawn(network, 60)
    said = [sentence for _, texts in steps for text in texts for sentence in text]
    again = sum("again" in sentence for sentence in said) / len(said)
    assert 0.42 < again < 0.53 and not any("aside" in sentence for sentence in said)
    for reading, texts in steps:
        assert reading.classes.tolist() == list(range(len(network.task.classes))) and not reading.mirrored
        for name, text in zip(network.task.classes, texts, strict=True):
            assert len(text) == len(ATTRIBUTES)
            assert all(name.lower() in sentence for sentence in text)
            assert all(a in sentence or a == NAME for a, sentence in zip(ATTRIBUTES, text, strict=True))


def test_steps_that_vary_and_steps_that_do_not():
    steps = drawn(network_for(task_for(vary_wording=0.5)), 60)
    varied = [any("again" in s for text in texts for s in text) for _, texts in steps]
    assert 15 < sum(varied) < 45


def test_a_task_without_wordings_reads_what_it_always_did():
    task = tiny_task(patch=PATCH, model=MODEL)
    network = network_for(task)
    assert not task.varied and network.wordings.bank is None
    reading = network.wordings.draw()
    assert torch.equal(reading.sentences.ids, network.model.text.ids) and reading.sentences.concepts is None


def test_absent_texts_stand_beside_the_classes_or_in_their_place():
    task = task_for(absent=0.5)
    count = len(task.classes)
    kinds = {"none": 0, "beside": 0, "some replaced": 0, "all replaced": 0}
    absent = absent_texts(task)
    network = network_for(task)
    own = {letters(s) for name, t in task.concepts.classes.items() for s in (name, *t.written())}
    for reading, texts in drawn(network):
        gone = (reading.classes == ABSENT).tolist()
        if not any(gone):
            kinds["none"] += 1
        elif len(gone) > count:
            assert gone[:count] == [False] * count and 1 <= len(gone) - count <= 2
            kinds["beside"] += 1
        else:
            kinds["all replaced" if all(gone) else "some replaced"] += 1
        for missing, text in zip(gone, texts, strict=True):
            assert len({letters(s) in own for s in text}) == 1 and missing == (letters(text[0]) not in own)
    assert 110 < kinds["none"] < 190 and 45 < kinds["beside"] < 110
    assert kinds["some replaced"] > 10 and kinds["all replaced"] > 10
    assert len(absent.structures) > 30 and len(absent.ordinary) > 100


def test_an_absent_region_has_no_voxel():
    label = torch.tensor([[[1, 0]], [[0, 1]]]).view(1, 2, 2, 1, 1)
    found = of_classes(label, torch.tensor([1, ABSENT, ABSENT]), 2, True)
    assert found[0, :, :, 0, 0].tolist() == [[0, 1], [0, 0], [0, 0]]


def test_what_is_replaced_is_background_and_what_is_absent_has_no_voxel():
    label = torch.arange(4).view(1, 1, 4, 1, 1)
    assert of_classes(label, torch.tensor([ABSENT, 1, 2]), 3, False).flatten().tolist() == [0, 0, 2, 3]
    assert of_classes(label, torch.tensor([0, 1, 2, ABSENT]), 3, False).flatten().tolist() == [0, 1, 2, 3]
    assert of_classes(label, torch.tensor([ABSENT] * 3), 3, False).flatten().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("make", [tiny_task, tiny_overlapping_task])
def test_a_step_with_everything_learns(make):
    """Losses are finite, and gradients reach the head, when classes are absent, sentences left out and misspelt."""
    task = task_for(make, absent=1.0, drop_concepts=0.5, typing_errors=0.5)
    network = network_for(task)
    image = torch.randn(1, len(task.channels), *PATCH)
    shape = (1, len(task.classes) if task.overlapping else 1, *PATCH)
    label = torch.randint(0, 2, shape)
    known = torch.tensor([[True, *[False] * (len(task.classes) - 1)]])
    for _ in range(4):
        network.zero_grad()
        parts = network(image, label, known)
        parts["loss"].backward()
        assert all(torch.isfinite(value) for value in parts.values())
        assert network.model.head.mlp[1].weight.grad.abs().sum() > 0


def test_left_out_sentences_do_not_shift_what_sets_a_class_apart():
    """Each attribute is compared with itself: D of the class is what it says of that attribute, less what the others
    do, whichever attributes are left out."""
    from lib.model.nets.heads import distinction

    own = torch.zeros(2, 2, 2)
    own[:, 1] = torch.tensor([0.0, 100.0])  # the second attribute is worded far away from the first
    own[0] += torch.tensor([1.0, 0.0])
    own[1] -= torch.tensor([1.0, 0.0])
    whole = distinction(own, own)
    for k in (0, 1):
        torch.testing.assert_close(distinction(own[:, [k]], own, torch.tensor([k])), whole, atol=1e-4, rtol=0)
    assert distinction(own[:, [1]], own)[0, 1] > 30, "without their numbers they would be far from both classes"


def test_no_step_reads_two_classes_as_one():
    """Of sentences that two classes share no step reads nothing else."""
    task = task_for(drop_concepts=1.0)
    said = concepts(list(task.classes), task.modality)
    for text in said["classes"].values():
        text["sentences"]["shape"] = "As all others."
    network = network_for(tiny_task(patch=PATCH, model=MODEL, training={"drop_concepts": 1.0}, concepts=said))
    sizes = {tuple(network.wordings._concepts().tolist()) for _ in range(STEPS)}
    assert (ATTRIBUTES.index("shape"),) not in sizes and len(sizes) > 20


def test_the_order_of_sentences_does_not_matter():
    """They are a set to the network: nothing has to be shuffled in training."""
    task = task_for()
    model = network_for(task).model.eval()
    image = torch.randn(1, len(task.channels), *PATCH)
    rows = task.text_rows()
    with torch.no_grad():
        first = model(image, model.text.tokenize(rows)).logits
        second = model(image, model.text.tokenize([row[::-1] for row in rows])).logits
        assert (first[:, 1:].std(dim=(2, 3, 4)) > 1e-3).all()
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_typing_errors():
    draw = random.Random(3)
    sentence = "The liver, in CT."
    found = {misspelt(sentence, draw) for _ in range(200)}
    assert sentence not in found or len(found) > 8
    assert all(abs(len(f) - len(sentence)) <= 1 and f.endswith("in CT.") and f.startswith("The l") for f in found)
    assert misspelt("CT of it.", draw) == "CT of it.", "no word is long enough"
    texts = drawn(network_for(task_for(typing_errors=0.5)), 30)
    said = [s for _, rows in texts for row in rows for s in row]
    right = {letters(s) for name, t in task_for().concepts.classes.items() for s in (name, *t.written())}
    assert 0.4 < sum(letters(s) not in right for s in said) / len(said) < 0.6


def test_an_encoder_from_scratch_draws_none_unless_it_is_asked_to():
    said = task_for().concepts.model_dump()
    assert not tiny_task(patch=PATCH, model=MODEL, concepts=said).varied
    assert tiny_task(patch=PATCH, model={**MODEL, "text": "minilm"}, concepts=said).varied
    assert task_for().varied and not load_task("quickstart").varied and load_task("acdc-mr").vary_wording == 1


def test_one_wording_alone_is_refused():
    text = {"sentences": {a: f"{a}." for a in ATTRIBUTES}}
    for variants, message in (
        ({"shape": ["Round."]}, "shape: one wording; at least 2"),
        ({"colour": ["Red.", "Blue."]}, "unknown attribute 'colour'; valid are class"),
        ({"shape": ["Round.", " "]}, "shape: wording 2 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassText.model_validate({**text, "variants": variants})


def test_a_reading_that_lasts_is_of_the_same_words():
    """Every third step draws and reads: the task's own text, which sets the classes apart, and what was drawn."""
    network = network_for(task_for(text_interval=3, absent=0.5))
    image, label = torch.randn(1, 1, *PATCH), torch.randint(0, 4, (1, 1, *PATCH))
    keys, passes = [], []
    for _ in range(7):
        before = network.model.text.token_passes
        network(image, label)["loss"].backward()
        passes.append(network.model.text.token_passes - before)
        keys.append(network.wordings.held.sentences.key)
    assert passes == [2, 0, 0, 2, 0, 0, 2] and len(set(keys)) == 3
    network.model.text.begin_epoch()
    network(image, label)
    assert network.wordings.held.sentences.key != keys[-1], "a resumed round draws when one that ran through does"


def test_the_bare_name_is_read_too():
    """As a wording of its own, and in a third of the steps that leave sentences out as all there is: once, or in the
    place of every sentence."""
    steps = drawn(network_for(task_for(drop_concepts=1.0)))
    alone = [texts for r, texts in steps if r.sentences.concepts is not None and r.sentences.concepts.tolist() == [0]]
    repeated = [texts for r, texts in steps if r.sentences.concepts is None and len(set(texts[0])) == 1]
    assert 40 < len(alone) < 80 and 30 < len(repeated) < 80 and 90 < len(alone) + len(repeated) < 150
    for kind, times in ((alone, 1), (repeated, len(ATTRIBUTES))):
        assert all(len(text) == times for texts in kind for text in texts)
        bare = [text[0] for texts in kind for text in texts if letters(text[0]) in ("liver", "spleen", "aorta")]
        assert len(bare) > 25


def test_no_absent_text_is_of_the_task_itself():
    """Nor of a task of its modality, whose structures its images may show."""
    task = load_task("hippocampus-mr")
    texts, aside = absent_texts(task), absent_texts(task, aside=True)
    said = {s for texts in (texts, aside) for s in (*texts.ordinary, *(s for t in texts.structures for s in t))}
    assert not any("hippocampus" in s.lower() for s in said)
    assert "The liver in a MR image." in said or "The liver in an MR image." in said
    assert not set(texts.ordinary) & set(aside.ordinary) and not set(texts.structures) & set(aside.structures)
    shared = absent_texts(load_task("quickstart"))
    assert not any("The liver" in s for t in shared.structures for s in t)

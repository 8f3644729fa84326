"""The text head: a class is its sentences and nothing else."""

import pytest
import torch

from lib.model import checkpoints
from lib.model.checkpoints import CheckpointError
from lib.model.nets import build_model
from lib.model.nets.heads import ClassPyramid, TextHead, distinction
from lib.trainers.objective import TrainingNetwork
from support.helpers import tiny_overlapping_task, tiny_task

PATCH = (64, 32, 32)


def task_for(overlapping=False, training=None, **model):
    make = tiny_overlapping_task if overlapping else tiny_task
    settings = {"vision": "unet", "feature_size": 4, "head": "text", **model}
    return make(patch=PATCH, model=settings, training=training or {})


def model_for(task, seed=0):
    torch.manual_seed(seed)
    return build_model(task)


def image_for(task, batch=1, seed=1):
    return torch.randn(batch, len(task.channels), *PATCH, generator=torch.Generator().manual_seed(seed))


def label_for(task, batch=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    if task.overlapping:
        return torch.randint(0, 2, (batch, len(task.classes), *PATCH), generator=generator)
    return torch.randint(0, len(task.classes) + 1, (batch, 1, *PATCH), generator=generator)


# The heads alone


@pytest.mark.parametrize("overlapping", [False, True])
def test_logits_are_features_times_what_the_text_says(overlapping):
    """Width 4: text e1 says weights (2, 0, 0, 0) and bias 1; e2 says (0, 0, 4, 0) and bias -1."""
    head = TextHead(4, 2, 3, overlapping)
    head.reader.forward = lambda text, apart: text
    linear = torch.nn.Linear(2, 5, bias=False)
    head.mlp = torch.nn.Sequential(linear)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, 0, 0, 0, 1], [0, 0, 4, 0, -1]]).T)
        if not overlapping:
            head.background.copy_(torch.tensor([0.0, 6, 0, 0, 0.5]))
        features = torch.tensor([3.0, 5, 7, 9]).view(1, 4, 1, 1, 1).expand(1, 4, 2, 1, 1)
        logits = head(features, torch.eye(2)[None], torch.zeros(2, 3))[0, :, 0, 0, 0]
    scale = 8 / 2  # the gain over the root of the width
    expected = [2 * 3 * scale + 1, 4 * 7 * scale - 1]
    torch.testing.assert_close(logits, torch.tensor(expected if overlapping else [6 * 5 * scale + 0.5, *expected]))


@pytest.mark.parametrize("overlapping", [False, True])
def test_class_maps_compare_each_place_with_the_text(overlapping):
    pyramid = ClassPyramid((8, 6, 4), 16, 7, overlapping)
    decoded = [torch.randn(2, width, *[side] * 3) for width, side in ((8, 2), (6, 4), (4, 8))]
    concepts, apart = torch.randn(2, 5, 4, 16), torch.randn(5, 7)
    first = 0 if overlapping else 1
    with torch.no_grad():
        maps, vectors = pyramid(torch.zeros(0), decoded, concepts, apart)
        key = pyramid.reader(concepts[1, 3].mean(0), apart[3])
        for n, side in enumerate((2, 4, 8)):
            query = pyramid.queries[n](pyramid.norms[n](decoded[n][1, :, 1, 0, 1]))
            assert maps[n].shape == (2, first + 5, *[side] * 3)
            torch.testing.assert_close(maps[n][1, first + 3, 1, 0, 1], query @ key * 8 / 4)  # gain 8, 16 numbers
        alone, same = pyramid.eval()(torch.zeros(0), decoded, concepts, apart)
    assert len(alone) == 1, "outside training the vectors' level alone"
    assert torch.equal(alone[0], maps[1])
    assert torch.equal(vectors, same)


def test_the_vector_of_a_class_is_the_mean_of_the_places_that_show_it():
    """Two classes, each certain of two of the four places at the middle level."""
    pyramid = ClassPyramid((4, 2, 4), 2, 3, overlapping=False).eval()
    pyramid.norms[1], pyramid.queries[1] = torch.nn.Identity(), torch.nn.Identity()
    pyramid.reader.forward = lambda text, apart: 100 * torch.eye(2)[None]
    with torch.no_grad():
        pyramid.background.fill_(10)
        places = torch.tensor([[1.0, 0], [3, 0], [0, 5], [0, 1]]).T.reshape(1, 2, 4, 1, 1)
        _, vectors = pyramid(torch.zeros(0), [None, places, None], torch.zeros(1, 2, 1, 2), torch.zeros(2, 3))
    torch.testing.assert_close(vectors, torch.tensor([[[2.0, 0], [0, 3.0]]]), rtol=1e-3, atol=1e-3)


def test_distinction_is_the_difference_from_the_tasks_mean_at_size_one():
    """Two classes of one sentence, (1, 1) and (1, 1.02), become (0, -root 2) and (0, root 2)."""
    own = torch.tensor([[[1.0, 1.0]], [[1.0, 1.02]]])
    apart = distinction(own, own)
    torch.testing.assert_close(apart, torch.tensor([[0.0, -(2**0.5)], [0.0, 2**0.5]]), rtol=2e-2, atol=1e-3)
    assert torch.equal(distinction(own[1:], own), apart[1:]), "whoever else is asked for"
    other = torch.tensor([[[1.0, 1.03], [1.0, 1.05]]])  # described anew, in two sentences of mean 1.04
    torch.testing.assert_close(distinction(other, own)[0], torch.tensor([0.0, 3 * 2**0.5]), rtol=2e-2, atol=1e-3)
    assert torch.equal(distinction(own[:1], own[:1]), torch.zeros(1, 2)), "a task of one class"


# In the network


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("vision", ["unet", "swin_unetr"])
def test_permuted_sentences_permute_the_masks(vision, overlapping):
    """No training, and nothing else in the network knows a class by its number: every output follows its sentences."""
    task = task_for(overlapping, vision=vision, feature_size=12)
    model, image = model_for(task).eval(), image_for(task)
    order, rows = [2, 0, 1], task.text_rows()
    with torch.no_grad():
        straight = model(image)
        moved = model(image, model.text.tokenize([rows[i] for i in order]))
    channels = order if overlapping else [0, *(1 + i for i in order)]
    for name, ours, theirs in (
        ("logits", moved.logits, straight.logits),
        ("class map", moved.class_maps[0], straight.class_maps[0]),
    ):
        torch.testing.assert_close(ours, theirs[:, channels], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3), f"{name} must tell the classes apart"
    for name in ("concept_rows", "concepts", "vision", "weights", "text"):
        torch.testing.assert_close(getattr(moved, name), getattr(straight, name)[:, order], rtol=1e-3, atol=1e-4)


def test_some_classes_are_asked_for():
    """Only their rows are read and only their channels computed. Without fusion the image never hears of the others,
    and the logits are those of the whole; with fusion it does (V attends to all rows), which class dropping trains."""
    for fusion in ("identity", "bifusion"):
        task = task_for(fusion=fusion)
        model, image = model_for(task).eval(), image_for(task)
        some = model.text.tokenize([task.text_rows()[i] for i in (0, 2)])
        with torch.no_grad():
            whole, part = model(image).logits[:, [0, 1, 3]], model(image, some).logits
        assert part.shape == whole.shape
        if fusion == "identity":
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
        else:
            assert 0 < (part - whole).norm() / whole.norm() < 0.5


def test_one_class_and_twenty_through_the_same_weights():
    task = task_for()
    model, image = model_for(task).eval(), image_for(task)
    with torch.no_grad():
        for count in (1, 20):
            rows = [[f"thing {i}, part {k}" for k in range(6)] for i in range(count)]
            output = model(image, model.text.tokenize(rows))
            assert output.logits.shape == (1, 1 + count, *PATCH)
            assert all(torch.isfinite(part).all() for part in (*output.class_maps, *output[:1], *output[2:]))


@pytest.mark.parametrize("text_format", ["concepts", "ambiguous", "definition", "name"])
def test_every_text_format(text_format):
    task = task_for(text_format=text_format, scratch={"layers": 4, "width": 16, "heads": 2, "max_tokens": 128})
    network = TrainingNetwork(model_for(task), task).train()
    parts = network(image_for(task), label_for(task))
    parts["loss"].backward()
    assert all(torch.isfinite(v) for v in parts.values())


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("vision", ["unet", "swin_unetr"])
def test_gradients_reach_every_parameter(vision, overlapping):
    task = task_for(overlapping, {"drop_classes": 0.0}, vision=vision, feature_size=12)
    network = TrainingNetwork(model_for(task), task).train()
    network(image_for(task, 2), label_for(task, 2))["loss"].backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, f"never trained: {silent[:5]}"


@pytest.mark.parametrize("overlapping", [False, True])
def test_bfloat16_and_one_class_leave_everything_finite_and_in_the_graph(overlapping):
    """Several GPUs wait for a gradient of every parameter, also in a step that knows one class only."""
    task = task_for(overlapping, {"drop_classes": 1.0, "drop_concepts": 1.0})
    network = TrainingNetwork(model_for(task), task).train()
    image, label = image_for(task), label_for(task)
    for seed in range(4):
        torch.manual_seed(seed)
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            parts = network(image, label)
        parts["loss"].backward()
        assert all(torch.isfinite(v) for v in parts.values())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


# Training with some of the classes


def test_steps_that_know_some_classes_only(monkeypatch):
    """The others are background; a label that was not drawn for a class stays so; the text is read once."""
    task = task_for(training={"drop_classes": 1.0, "drop_concepts": 1.0})
    network = TrainingNetwork(model_for(task), task).train()
    seen = []

    def spy(logits, label, overlapping, annotated):
        seen.append((logits.shape[1], label, annotated))
        return logits.mean()

    monkeypatch.setattr("lib.trainers.objective.network.segmentation_loss", spy)
    monkeypatch.setattr("lib.trainers.objective.wordings._some", lambda numbers, share: numbers[[0, 2]])
    label = torch.arange(4).view(1, 1, 4, 1, 1).repeat(1, 1, 16, 32, 32)
    passes = network.model.text.token_passes
    network(image_for(task), label, torch.tensor([[True, False, True]]))
    network(image_for(task), label, torch.tensor([[False, True, True]]))
    assert network.model.text.token_passes == passes + 2
    (channels, first, declared), (_, _, partly) = seen
    assert channels == 3
    assert first[0, 0, :4, 0, 0].tolist() == [0, 1, 0, 2]
    assert declared is None, "all that is left was declared"
    assert partly.tolist() == [[False, True]]
    network.eval()
    network(image_for(task), label)
    assert seen[-1][0] == 4, "validation knows every class"


def test_share_and_size_of_what_is_dropped():
    from lib.trainers.objective.wordings import _some

    torch.manual_seed(0)
    numbers = torch.arange(5)
    drawn = [_some(numbers, 0.4).tolist() for _ in range(1000)]
    part = [d for d in drawn if len(d) < 5]
    assert 330 < len(part) < 470
    assert {len(d) for d in part} == {1, 2, 3, 4}
    assert all(d == sorted(set(d)) for d in drawn)
    assert {n for d in part for n in d} == set(range(5))
    assert _some(numbers[:1], 1.0).tolist() == [0]
    assert all(len(_some(numbers, 0.0)) == 5 for _ in range(50))


def test_the_fixed_head_drops_nothing(monkeypatch):
    task = task_for(head="fixed", training={"drop_classes": 1.0})
    network = TrainingNetwork(model_for(task), task).train()
    monkeypatch.setattr(
        "lib.trainers.objective.wordings._some", lambda *_: pytest.fail("the fixed head has one channel per class")
    )
    network(image_for(task), label_for(task))


def test_a_checkpoint_from_before_the_decoders_class_maps(tmp_path):
    """A fixed head goes on with the paper's class embedding; the text head was another network."""
    for head, embedding in (("fixed", "last"), ("text", "decoder")):
        task = task_for(head=head, class_embedding=embedding)
        old = {**checkpoints.checkpoint_of(model_for(task), task, {}), "format": 2}
        del old["task"]["model"]["class_embedding"]
        path = tmp_path / f"{head}.pt"
        checkpoints.save(old, path)
        if head == "fixed":
            _, restored = checkpoints.restore_model(checkpoints.load(path), path)
            assert restored.model.class_embedding == "last"
        else:
            with pytest.raises(CheckpointError, match="format 2"):
                checkpoints.load(path)


def test_the_papers_class_embedding_has_a_channel_a_class():
    with pytest.raises(ValueError, match="it needs head 'fixed'"):
        task_for(class_embedding="last")


@pytest.mark.parametrize("head", ["fixed", "text"])
def test_a_reading_of_the_text_lasts_some_training_steps(head):
    """If it stands in, the layers below the first fusion learn nothing, those that carry the rows do."""
    task = task_for(head=head, training={"text_interval": 3, "drop_classes": 0.5})
    network = TrainingNetwork(model_for(task), task).train()
    text, image = network.model.text, image_for(task)
    label = torch.zeros(1, 1, *image.shape[2:], dtype=torch.long)
    embeddings = text.bert.embeddings.word_embeddings.weight
    (rows,) = [p for name, p in text.bert.encoder.layer[-1].named_parameters() if name == "output.dense.weight"]

    def step() -> bool:
        """Whether the text was read; with gradients then, and only then."""
        passes = text.token_passes
        network.zero_grad(set_to_none=True)
        network(image, label)["loss"].backward()
        assert rows.grad is not None and rows.grad.any()
        assert (embeddings.grad is not None) == (text.token_passes > passes)
        return text.token_passes > passes

    assert [step() for _ in range(7)] == [True, False, False, True, False, False, True]
    text.begin_epoch()
    assert [step() for _ in range(2)] == [True, False]
    network.eval()
    with torch.no_grad():
        before = network.model(image).concept_rows
        embeddings.add_(0.5)
        assert not torch.equal(network.model(image).concept_rows, before), "outside training nothing stands in"


def test_each_text_has_its_own_interval():
    """Mirrored steps read a second text. Of it too only the first step in three reads, whatever is dropped."""
    recipe = {"text_interval": 3, "drop_classes": 1.0}
    tasks = {mirror: task_for(training={**recipe, "mirror": mirror}) for mirror in (0.0, 1.0)}
    task = tasks[1.0]
    network = TrainingNetwork(model_for(task), task).train()
    text, image, label = network.model.text, image_for(task), label_for(task)
    network.wordings.mirrored = text.tokenize([[f"left {sentence}" for sentence in rows] for rows in task.text_rows()])

    def passes(mirror: float) -> int:
        network.wordings.recipe = tasks[mirror].training
        before = text.token_passes
        network(image, label)["loss"].backward()
        return text.token_passes - before

    assert [passes(1.0) for _ in range(6)] == [2, 0, 0, 2, 0, 0]
    # A text that was not read for three steps is read anew; until then it is kept, however often the other is read.
    assert [passes(m) for m in (0.0, 1.0, 0.0, 1.0, 1.0)] == [1, 1, 0, 1, 1]
    text.begin_epoch()
    assert [passes(1.0) for _ in range(2)] == [2, 0]
    assert TrainingNetwork(model_for(task), task).wordings.mirrored is None, "these sentences name no side"


def test_a_plain_head_reads_d_alone():
    """The same class in every image: T does not count, and has no weights."""
    torch.manual_seed(0)
    head = TextHead(4, 2, 3, False, plain=True)
    assert [name for name, _ in head.reader.named_parameters()] == ["apart.weight", "apart.bias"]
    features, apart = torch.randn(2, 4, 2, 2, 2), torch.randn(5, 3)
    first, second = (head(features, torch.randn(2, 5, 2), apart) for _ in range(2))
    assert first.shape == (2, 6, 2, 2, 2) and torch.equal(first, second)
    with pytest.raises(CheckpointError, match="text of the head 'fused', the server's task has 'plain'"):
        old, task = task_for(), task_for(head_text="plain")
        checkpoints.check_same_task(checkpoints.checkpoint_of(model_for(old), old, {}), task)

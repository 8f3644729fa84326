"""How a version reads texts without an image: at the places of its classes, against the background and each other."""

import pytest
import torch

from lib.model.nets import build_model
from lib.model.nets.reading import KEY, Places, describe, logits_at, misread, places_in
from lib.trainers.evaluation import find_places
from support.helpers import tiny_overlapping_task, tiny_task, write_nifti

PATCH = (64, 32, 32)
MODEL = {"vision": "unet", "feature_size": 4, "head": "text"}


@pytest.fixture(scope="module", params=[tiny_task, tiny_overlapping_task])
def read(request):
    """A task, its network, and places at which the class of the same number has the highest logit."""
    task = request.param(patch=PATCH, model=MODEL)
    torch.manual_seed(0)
    model = build_model(task).eval()
    count, width = len(task.classes), model.vision.feature_width
    with torch.no_grad():
        # Kernels that are told apart by their text: D alone decides, and is large.
        model.get_parameter("head.reader.apart.weight").normal_(std=0.5)
        basis = Places(tuple(map(str, range(width + 1))), torch.cat([torch.zeros(1, width), torch.eye(width)]))
        kernels = logits_at(model, basis, task.text_rows())
        weights, bias = kernels[:, 1:] - kernels[:, :1], kernels[:, :1]
        wanted = torch.where(torch.eye(count).bool(), 3.0, -3.0)
        features = torch.linalg.lstsq(weights, wanted - bias).solution.T
    return task, model, Places(task.classes, features)


def test_logits_are_those_of_the_head(read):
    """Kernels are affine in the features, so what comes out at the places is what was solved for."""
    task, model, places = read
    found = logits_at(model, places, task.text_rows())
    expected = torch.where(torch.eye(len(task.classes)).bool(), 3.0, -3.0)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert misread(model, places, task) == {}


def test_exchanged_texts_are_named(read):
    task, model, places = read
    one, other = task.classes[:2]
    texts = task.concepts.classes
    words = {one: texts[other].sentences, other: texts[one].sentences}
    found = misread(model, places, task.with_concepts(words))
    assert found == {one: other, other: one}
    said = describe(found, 7)
    assert said[one] == f"to version 7 the text of {one} reads like {other}" and len(said) == 2


def test_a_text_that_is_drawn_nowhere_is_named(read):
    task, model, places = read
    far = Places(places.names, places.features.clone())
    far.features[0] = torch.linalg.lstsq(places.features, torch.zeros(len(places.features), 1)).solution[:, 0]
    logits = logits_at(model, far, task.text_rows())
    found = misread(model, far, task)
    assert (task.classes[0] in found) == bool(logits[0].max() < 0.5 or logits[0].argmax() != 0)
    nothing = Places(places.names, torch.zeros_like(places.features) - 5 * places.features.mean(0))
    read_as = misread(model, nothing, task)
    logits = logits_at(model, nothing, task.text_rows())
    assert {n for n, v in read_as.items() if v is None} >= {
        n for n, row in zip(task.classes, logits, strict=True) if row.max() < 0.5
    }
    assert "describes nothing that it knows" in describe({task.classes[0]: None}, 1)[task.classes[0]]


def test_the_network_stays_as_it_is(read):
    task, model, places = read
    model.train()
    logits_at(model, places, task.text_rows())
    assert model.training
    model.eval()


def test_places_are_the_mean_features_where_label_and_prediction_agree(tmp_path):
    """By hand from the same prediction; a class that the label does not show has no place."""
    from lib.model.predict import predict
    from lib.volumes.transforms import apply, load

    task = tiny_task(patch=PATCH, model=MODEL)
    torch.manual_seed(1)
    model = build_model(task).eval()
    image = write_nifti(tmp_path / "image.nii.gz", torch.randn(64, 32, 32).mul(200).numpy())
    data = apply(load(task, label=False), {"image": str(image)})
    found = predict(model, data["image"], task, keep_features=True)
    drawn = found.probabilities.argmax(0)
    shown = int(drawn[drawn > 0].mode().values)
    label = torch.zeros_like(drawn)
    label[:20][drawn[:20] == shown] = task.label_values[task.classes[shown - 1]]
    case = {"image": str(image), "label": str(write_nifti(tmp_path / "label.nii.gz", label.numpy().astype("uint8")))}
    places = find_places(model, task, [case, case])
    assert places.names == (task.classes[shown - 1],)
    expected = found.features.float()[:, :20][:, drawn[:20] == shown].mean(1)
    torch.testing.assert_close(places.features[0], expected, atol=1e-3, rtol=1e-3)
    assert find_places(build_model(tiny_task(patch=PATCH, model={**MODEL, "head": "fixed"})), task, [case]) is None


def test_places_of_a_checkpoint(read):
    task, model, places = read
    kept = places_in({KEY: places.to_entry()}, model)
    assert kept.names == places.names and torch.equal(kept.features, places.features)
    narrow = {"names": list(places.names), "features": torch.zeros(len(places.names), 1)}
    for entry in (None, {"names": ["a"]}, narrow, "places"):
        assert places_in({KEY: entry}, model) is None

"""A label that declares its classes teaches nothing about the others."""

import numpy as np
import pytest
import torch

from lib.model.losses import class_map_loss, segmentation_loss
from lib.model.nets import build_model
from lib.stores.cases import audit
from lib.tasks import TaskError
from lib.trainers.objective import TrainingNetwork
from lib.volumes.transforms import apply, load
from support.helpers import tiny_overlapping_task, tiny_task, write_nifti

SHAPE = (20, 20, 20)


def case(folder, **more):
    """A case whose label shows liver (1) and, in one voxel, spleen (2)."""
    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    label[5:10, 5:10, 5:10] = 1
    label[15, 15, 15] = 2
    image = write_nifti(folder / "a.nii.gz", rng.uniform(0, 200, SHAPE).astype(np.float32))
    return {"id": "a", "image": str(image), "label": str(write_nifti(folder / "label.nii.gz", label)), **more}


def test_names_become_a_mask_in_channel_order():
    task = tiny_task()
    assert task.annotated(None) == (True, True, True)
    assert task.annotated(["aorta", "liver"]) == (True, False, True)
    for names, words in ((["livr"], "unknown class 'livr'; valid are liver, spleen, aorta"), ([], "no class is named")):
        with pytest.raises(TaskError, match=words):
            task.annotated(names)


def test_a_region_is_annotated_where_all_its_labels_are():
    task = tiny_overlapping_task()
    assert task.annotated(["enhancing tumour", "non-enhancing tumour"]) == (False, True, True)
    assert task.annotated(["whole tumour"]) == (True, False, False)


def test_loading_carries_the_declaration(tmp_path):
    task = tiny_task()
    assert apply(load(task, label=True), case(tmp_path))["annotated"].tolist() == [True, True, True]
    loaded = apply(load(task, label=True), case(tmp_path, annotated=["liver"]))
    assert loaded["annotated"].tolist() == [True, False, False]


def test_the_audit_counts_declared_classes_only(tmp_path):
    task = tiny_task()
    report = audit(task, [case(tmp_path, annotated=["liver"])])
    assert report.cases[0].counts == {"liver": 125}
    assert report.missing == ("spleen", "aorta")
    assert report.usable[0]["annotated"] == ["liver"], "the round needs it too"
    unknown = audit(task, [case(tmp_path, annotated=["kidney"])])
    assert "unknown class 'kidney'" in unknown.cases[0].problem


def test_the_objective_leaves_other_classes_out():
    task = tiny_task()
    torch.manual_seed(0)
    network = TrainingNetwork(build_model(task), task).eval()
    image, label = torch.randn(2, 1, *task.patch), torch.randint(0, 4, (2, 1, *task.patch))
    full, declared = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, False, True], [True, True, True]])
    with torch.no_grad():
        plain, same, partial = (network(image, label, a) for a in (None, full, declared))
        output = network.model(image)
        expected = segmentation_loss(output.logits, label, classes=declared)
        maps = class_map_loss(output.class_maps[0], label, classes=declared)
    assert plain["segmentation"] == same["segmentation"]
    torch.testing.assert_close(partial["segmentation"], expected)
    assert partial["segmentation"] != plain["segmentation"]
    assert partial["alignment"] != plain["alignment"], "an undeclared class is not visual evidence"
    torch.testing.assert_close(partial["class_embedding"], maps)
    assert partial["class_embedding"] != plain["class_embedding"]


def test_an_undeclared_class_is_not_pushed_down_where_the_label_says_background():
    """Both cases say 'background' where the model sees a spleen; only the complete label contradicts it."""
    logits = torch.zeros(1, 4, 4, 4, 4)
    logits[:, 2] = 5.0
    label = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    gradients = []
    for declared in ([True, True, True], [True, False, True]):
        given = logits.clone().requires_grad_()
        segmentation_loss(given, label, classes=torch.tensor([declared])).backward()
        gradients.append(given.grad[:, 2].sum().item())
    assert gradients[0] > 0.5, "descent lowers the spleen"
    assert gradients[1] < 0.01 * gradients[0]

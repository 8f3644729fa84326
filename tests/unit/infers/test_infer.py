"""The inference task without a server: geometry on any grid, options, and models that come and go."""

from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.infers import BiPVLInfer
from lib.model import versions
from lib.model.nets import build_model
from lib.model.predict import predict
from lib.model.versions import CheckpointError
from support.helpers import read_nifti, tiny_task, write_nifti

PATCH = (48, 48, 48)


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH, model={"vision": "unet", "feature_size": 4})


def volume(shape, seed=0):
    return np.random.default_rng(seed).integers(-50, 200, shape).astype(np.int16)


def segment(engine, path, **options):
    return engine({"image": str(path), "device": "cpu", "logging": "WARNING", **options})


@pytest.mark.parametrize("shape", [(20, 18, 9), (61, 50, 30)])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_mask_has_exactly_the_grid_of_the_image(task, tmp_path, shape, codes):
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape) @ np.diag([1.3, 0.9, 2.1, 1])
    image = write_nifti(tmp_path / "image.nii.gz", volume(shape), affine)
    file, _ = segment(BiPVLInfer(task, tmp_path / "m"), image)
    mask = read_nifti(file)
    assert mask.shape == shape
    assert np.array_equal(mask.affine, read_nifti(image).affine)
    assert mask.get_data_dtype() == np.uint8


def test_affine_kept_as_a_quaternion_is_copied_exactly(task, tmp_path):
    angle = 0.1234567
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.37, 1.37, 7.5])
    image = nib.Nifti1Image(volume((24, 24, 10)), affine)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    nib.save(image, tmp_path / "oblique.nii.gz")
    file, _ = segment(BiPVLInfer(task, tmp_path / "m"), tmp_path / "oblique.nii.gz")
    ours, theirs = read_nifti(file), read_nifti(tmp_path / "oblique.nii.gz")
    assert np.array_equal(ours.affine, theirs.affine)
    assert (int(ours.header["qform_code"]), int(ours.header["sform_code"])) == (1, 0)


def test_a_new_version_is_served_and_an_old_one_can_be_asked_for(task, tmp_path):
    image = write_nifti(tmp_path / "image.nii.gz", volume((30, 30, 20)), np.eye(4))
    engine = BiPVLInfer(task, tmp_path / "m")
    masks = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        engine.versions.publish(versions.checkpoint_of(build_model(task), task, {}))
        file, result = segment(engine, image)
        assert result["model_version"] == seed
        masks[seed] = np.asarray(read_nifti(file).dataobj)
    assert not np.array_equal(masks[1], masks[2])
    file, result = segment(engine, image, model_version="1")
    assert result["model_version"] == 1
    assert np.array_equal(np.asarray(read_nifti(file).dataobj), masks[1])
    assert engine.config()["model_version"] == ["served", "2", "1"]


def test_a_whole_option_list_means_its_first_entry(task, tmp_path):
    image = write_nifti(tmp_path / "image.nii.gz", volume((20, 20, 20)), np.eye(4))
    engine = BiPVLInfer(task, tmp_path / "m")
    _, result = segment(engine, image, **{k: v for k, v in engine.config().items() if k != "device"})
    assert result["model_version"] == 0


def test_a_checkpoint_of_another_task_is_refused(task, tmp_path):
    engine = BiPVLInfer(task, tmp_path / "m")
    other = tiny_task(patch=PATCH, model={"vision": "unet", "feature_size": 8})
    engine.versions.publish(versions.checkpoint_of(build_model(other), other, {}))
    image = write_nifti(tmp_path / "image.nii.gz", volume((20, 20, 20)), np.eye(4))
    with pytest.raises(CheckpointError, match="feature size 8, the server's task has 4"):
        segment(engine, image)


def test_empty_windows_are_skipped_and_are_background(task):
    torch.manual_seed(0)
    model = build_model(task).eval()
    image = torch.zeros(1, 96, 48, 48)
    image[:, :48] = torch.rand(1, 48, 48, 48)
    calls = []
    handle = model.register_forward_hook(lambda _m, i, _o: calls.append(len(i[0])))
    prediction = predict(model, image, task, overlap=0.0)
    handle.remove()
    assert (prediction.windows, prediction.skipped, sum(calls)) == (2, 1, 1)
    assert (prediction.probabilities[:, 48:].argmax(0) == 0).all()
    assert prediction.concept_weights.sum(-1) == pytest.approx(torch.ones(3), abs=1e-5)


def test_a_network_in_training_mode_predicts_nothing(task):
    with pytest.raises(AssertionError, match="in training mode dropout"):
        predict(build_model(task).train(), torch.rand(1, *PATCH), task)


def test_weights_and_text_are_those_that_the_network_returned(task):
    torch.manual_seed(0)
    model = build_model(task).eval()
    given = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0, 0.0]).expand(1, 3, 6)

    def replaced(_model, _inputs, output):
        """Text and vision of classes 1 and 2 agree, those of 3 are opposites; lengths do not count."""
        vision = torch.zeros_like(output.vision)
        vision[0, 0, 0], vision[0, 1, 1], vision[0, 2, 2] = 1, 2, 3
        return output._replace(weights=given, vision=vision, text=vision * torch.tensor([4, 1, -1]).view(3, 1))

    handle = model.register_forward_hook(replaced)
    prediction = predict(model, torch.rand(1, *PATCH), task)
    handle.remove()
    torch.testing.assert_close(prediction.concept_weights, given[0])
    torch.testing.assert_close(prediction.similarity, torch.diag(torch.tensor([1.0, 1.0, -1.0])))


def test_memory_pressure_falls_back_to_smaller_settings(task, monkeypatch):
    torch.manual_seed(0)
    model = build_model(task).eval()
    image = torch.rand(1, 60, 48, 48)
    expected = predict(model, image, task, overlap=0.5).probabilities
    told: list[Any] = []
    forward = type(model).forward

    def short(self, patches, sentences=None):
        if len(patches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, patches, sentences)

    monkeypatch.setattr(type(model), "forward", short)
    result = predict(model, image, task, overlap=0.5, window_batch=2, progress=told.append)
    assert "out of memory with 2 windows" in told[0]
    torch.testing.assert_close(result.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_tta_averages_over_the_flips_of_training():
    flipping = tiny_task(
        patch=PATCH, model={"vision": "unet", "feature_size": 4}, augmentation={"flip": ["inferior-superior"]}
    )
    torch.manual_seed(0)
    model = build_model(flipping).eval()
    image = torch.rand(1, *PATCH)
    with torch.no_grad():
        straight = model(image[None]).logits[0]
        turned = model(image[None].flip(4)).logits[0].flip(3)
    result = predict(model, image, flipping, tta=True).probabilities
    torch.testing.assert_close(result, ((straight + turned) / 2).softmax(0), rtol=1e-4, atol=1e-5)

"""The map of the uncertainty: on the grid of the image, with what the prediction says there."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.model.predict import predict
from lib.volumes.transforms import apply, load, restore_map
from support.helpers import read_nifti, write_nifti
from support.scoring import publish


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_the_map_lies_on_the_grid_of_the_image(engine, task, tmp_path, codes):
    """uint8 percent of the largest entropy, with the image's very geometry, and what the prediction says there."""
    shape = (31, 24, 17)
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)
    volume = np.random.default_rng(0).integers(-50, 200, shape).astype(np.int16)
    image = write_nifti(tmp_path / "image.nii.gz", volume, affine)
    publish(engine, task, 1)
    file, result = engine({"image": str(image), "device": "cpu", "logging": "WARNING", "uncertainty_map": "true"})
    found = read_nifti(result["uncertainty_map"])
    assert found.shape == shape and found.get_data_dtype() == np.uint8
    assert np.array_equal(found.affine, read_nifti(image).affine)
    data = apply(load(task, label=False), {"image": str(image)})["image"]
    entropy = predict(engine.loaded("cpu")[1], data, task).entropy()
    expected = np.zeros(shape)
    # Voxels are 1 mm, as the network's: what was turned to RAS is turned back, and nothing is interpolated.
    expected[...] = restore_map(entropy, data)
    percent = np.asarray(found.dataobj)
    assert np.abs(percent / 100 - expected).max() <= 0.0051
    assert len(np.unique(percent)) > 5
    Path(file).unlink()
    Path(result["uncertainty_map"]).unlink()
    _, plain = engine({"image": str(image), "device": "cpu", "logging": "WARNING"})
    assert "uncertainty_map" not in plain


def test_a_map_is_interpolated_linearly_and_zero_outside():
    values = torch.arange(4.0)[:, None, None].expand(4, 4, 4).contiguous()
    crop = torch.diag(torch.tensor([2.0, 1, 1, 1], dtype=torch.float64))
    crop[0, 3] = 4.0  # the network's grid: 2 mm along the first axis, from 4 mm on
    meta = {"affine": crop, "original_affine": torch.eye(4, dtype=torch.float64), "spatial_shape": [14, 4, 4]}
    found = restore_map(values, meta)[:, 1, 1]
    assert found.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3, 0, 0])
    assert found.dtype == np.float32


def test_a_kept_map_replaces_the_one_before_and_fills_no_history(store, tmp_path):
    for value in (10, 20):
        file = write_nifti(tmp_path / "map.nii.gz", np.full((30, 30, 20), value, np.uint8))
        store.keep_map("a", file, {"model": "tiny"})
    assert np.asarray(read_nifti(store.get_label_uri("a", "uncertainty")).dataobj).max() == 20
    assert not (store.folder / "labels" / "history").exists()
    assert store.get_labeled_images() == ["b"], "a map is not a label"
    assert [case["id"] for case in store.datalist()] == ["b"]

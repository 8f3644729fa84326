"""Geometry and intensity of preprocessing, and restoration to the grid of the file."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from lib.volumes.reading import MAX_VALUE
from lib.volumes.transforms import apply, encode, largest_components, load, restore
from support.helpers import label, one_hot, tiny_overlapping_task, tiny_task, write_nifti

BASE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 3.0, -100], [0, 0, 0, 1]])


def reorient(data: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in the same place, stored along other axes."""
    target = nib.orientations.axcodes2ornt(codes)
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), target)
    turned = np.ascontiguousarray(nib.orientations.apply_orientation(data, change))
    return turned, affine @ nib.orientations.inv_ornt_aff(change, data.shape)


def anatomy(shape: tuple[int, int, int] = (20, 24, 18)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy body without any symmetry, with three organs; it reaches all faces, so that nothing is cropped."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-100, 200, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[2:9, 3:20, 4:15] = 1
    mask[10:18, 2:8, 0:6] = 2
    mask[12:14, 10:23, 9:18] = 3
    return image, mask


def write_case(folder: Path, image: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return {
        "image": str(write_nifti(folder / "image.nii.gz", image, affine)),
        "label": str(write_nifti(folder / "label.nii.gz", mask, affine)),
    }


def native_task(**changes):
    return tiny_task(spacing=[2.0, 1.5, 3.0], **changes)


# Preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "LAS", "RAS", "SPR", "ALI", "IRP"])
def test_storage_order_changes_neither_input_nor_restored_mask(tmp_path, codes):
    task = native_task()
    image, mask = anatomy()
    reference = apply(load(task, label=True), write_case(tmp_path / "ras", image, mask, BASE))
    turned_image, affine = reorient(image, BASE, codes)
    turned_mask, _ = reorient(mask, BASE, codes)
    got = apply(load(task, label=True), write_case(tmp_path / "turned", turned_image, turned_mask, affine))

    assert torch.equal(got["image"].as_tensor(), reference["image"].as_tensor())
    assert torch.equal(got["label"].as_tensor(), reference["label"].as_tensor())
    assert np.allclose(got["image"].affine, reference["image"].affine)
    restored = restore(one_hot(got["label"].as_tensor(), task.out_channels), got["image"], task)
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, turned_mask)


def test_oblique_grid_is_restored_exactly(tmp_path):
    angle = np.radians(12)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image, mask = anatomy()
    task = native_task()
    got = apply(load(task, label=True), write_case(tmp_path, image, mask, turn @ BASE))
    restored = restore(one_hot(got["label"].as_tensor(), 4), got["image"], task)
    assert np.array_equal(restored, mask)


def test_resampling_follows_the_affine(tmp_path):
    """An image that holds its own x coordinate still does so on the network's grid."""
    index = np.arange(20)
    image = np.broadcast_to((BASE[0, 0] * index + BASE[0, 3])[:, None, None], (20, 10, 8)).astype(np.float32)
    task = tiny_task(spacing=[1.2, 1.5, 3.0], intensity={"low": -200, "high": 200})
    got = apply(load(task, label=False), {"image": str(write_nifti(tmp_path / "x.nii.gz", image, BASE))})["image"]
    x = got.affine.numpy()[0] @ np.stack([np.arange(got.shape[1]), *np.zeros((2, got.shape[1])), np.ones(got.shape[1])])
    inside = x <= image.max()
    assert inside.sum() > 25
    assert np.allclose(got[0, inside, 0, 0].numpy() * 400 - 200, x[inside], atol=1e-3)
    assert np.allclose(np.linalg.norm(got.affine.numpy()[:3, :3], axis=0), task.spacing)


def test_spacing_is_in_ras_axes(tmp_path):
    """Slices of 8 mm stored first are still the inferior-superior axis."""
    image, mask = anatomy((16, 16, 16))
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    task = tiny_task(spacing=[2.0, 1.0, 8.0])
    turned, turned_affine = reorient(image, affine, "SRA")
    got = apply(load(task, label=False), {"image": str(write_nifti(tmp_path / "i.nii", turned, turned_affine))})[
        "image"
    ]
    assert np.allclose(np.diag(got.affine.numpy())[:3], [2.0, 1.0, 8.0])
    # centres span 15 voxels: 7.5 -> 8 steps of 2 mm, 15 of 1 mm, 60 mm -> 8 (7.5 rounded) of 8 mm
    assert got.shape[1] in (8, 9) and got.shape[2] == 16 and got.shape[3] in (8, 9)


def test_range_mode_clips_and_scales(tmp_path):
    image = np.zeros((8, 8, 8), np.float32)
    image[0, 0, 0], image[1, 1, 1], image[7, 7, 7] = -1000, 37.5, 3000
    got = apply(load(tiny_task(), label=False), {"image": str(write_nifti(tmp_path / "i.nii", image))})["image"]
    assert got[0, 0, 0, 0] == 0 and got[0, 7, 7, 7] == 1
    assert got[0, 1, 1, 1].item() == pytest.approx(0.5)  # 37.5 is halfway between -175 and 250


def test_nonzero_mode_standardises_each_channel(tmp_path):
    rng = np.random.default_rng(1)
    image = rng.normal(500, 80, (10, 10, 10, 4)).astype(np.float32)
    image[..., 3] *= 7
    image[:4] = 0
    task = tiny_overlapping_task()
    got = apply(load(task, label=False), {"image": str(write_nifti(tmp_path / "i.nii", image))})["image"]
    assert got.shape == (4, 6, 10, 10)  # the zero block is cropped away
    for channel in got.as_tensor():
        assert channel.mean().item() == pytest.approx(0, abs=1e-3)
        assert channel.std().item() == pytest.approx(1, abs=1e-2)


def test_crop_to_foreground_is_undone(tmp_path):
    image = np.full((30, 30, 30), -1000, np.float32)
    image[5:20, 8:25, 10:16] = 50
    mask = np.zeros(image.shape, np.uint8)
    mask[6:12, 9:20, 11:15] = 3
    task = tiny_task()
    got = apply(load(task, label=True), write_case(tmp_path, image, mask, np.eye(4)))
    assert got["image"].shape == (1, 15, 17, 6)
    assert got["image"].affine[:3, 3].tolist() == [5, 8, 10]
    assert np.array_equal(restore(one_hot(got["label"].as_tensor(), 4), got["image"], task), mask)
    # A network that calls everything aorta still leaves what was cropped away to the background.
    everything = torch.zeros(4, 15, 17, 6)
    everything[3] = 1
    assert np.array_equal(restore(everything, got["image"], task) == 3, image > -1000)


# Labels ----------------------------------------------------------------------------------------------------------


def test_label_values_are_matched_by_name():
    labels = {"aorta": label(1, file_values=[820]), "liver": label(2, file_values=[500, 501]), "spleen": label(300)}
    task = tiny_task(labels=labels)
    values = torch.tensor([0, 820, 500, 501, 300, 1, 2]).reshape(1, 7, 1, 1)
    assert encode(values, task).flatten().tolist() == [0, 1, 2, 2, 3, 1, 2]
    # Another order of the same classes moves the channels, not the meaning.
    other = tiny_task(labels={name: labels[name] for name in ("spleen", "liver", "aorta")})
    assert encode(values, other).flatten().tolist() == [0, 3, 2, 2, 1, 3, 2]


def test_restored_values_are_by_name_and_wide_enough(tmp_path):
    task = native_task(labels={"aorta": label(820), "liver": label(2, file_values=[500]), "spleen": label(1)})
    image, mask = anatomy()
    stored = np.array([0, 820, 500, 1], np.uint16)[mask]
    got = apply(load(task, label=True), write_case(tmp_path, image, stored, BASE))
    restored = restore(one_hot(got["label"].as_tensor(), 4), got["image"], task)
    assert restored.dtype == np.uint16
    assert np.array_equal(restored, np.array([0, 820, 2, 1])[mask])


def test_overlapping_labels_become_regions_and_come_back(tmp_path):
    task = tiny_overlapping_task(spacing=[2.0, 1.5, 3.0])
    image, mask = anatomy()
    data = write_case(tmp_path, np.stack([image, 2 * image, image + 7, -image], -1), mask, BASE)
    got = apply(load(task, label=True), data)
    regions = got["label"].as_tensor().bool().numpy()
    assert got["label"].shape == (3, 20, 24, 18)
    assert np.array_equal(regions[0], mask > 0)
    assert np.array_equal(regions[1], mask >= 2)
    assert np.array_equal(regions[2], mask == 3)
    assert np.array_equal(restore(got["label"].as_tensor(), got["image"], task), mask)


@pytest.mark.parametrize(
    ("whole", "core", "enhancing", "value"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (1, 1, 0, 2), (1, 1, 1, 3), (0, 1, 0, 2), (0, 0, 1, 3), (1, 0, 1, 3), (0, 1, 1, 3)],
)
def test_contradicting_regions_go_to_the_most_specific_label(whole, core, enhancing, value):
    probabilities = torch.tensor([whole, core, enhancing]).float().reshape(3, 1, 1, 1).expand(3, 2, 2, 2)
    meta = {"affine": np.eye(4), "original_affine": np.eye(4), "spatial_shape": (2, 2, 2)}
    assert (restore(probabilities, meta, tiny_overlapping_task()) == value).all()


def test_label_in_another_orientation_than_its_image(tmp_path):
    image, mask = anatomy()
    lps, lps_affine = reorient(image, BASE, "LPS")
    las, las_affine = reorient(mask, BASE, "LAS")
    data = {
        "image": str(write_nifti(tmp_path / "image.nii.gz", lps, lps_affine)),
        "label": str(write_nifti(tmp_path / "label.nii.gz", las, las_affine)),
    }
    got = apply(load(native_task(), label=True), data)
    assert np.array_equal(got["label"][0].numpy(), mask)


# Bad input -------------------------------------------------------------------------------------------------------


def _message(task, data) -> str:
    with pytest.raises(ValueError) as error:
        apply(load(task, label="label" in data), data)
    return str(error.value)


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 1)])
def test_two_dimensional_image(tmp_path, shape):
    path = write_nifti(tmp_path / "flat.nii.gz", np.ones(shape, np.float32))
    message = _message(tiny_task(), {"image": str(path)})
    assert str(path) in message and "not a volume" in message and "12, 12" in message


def test_wrong_number_of_channels(tmp_path):
    path = write_nifti(tmp_path / "two.nii.gz", np.random.rand(6, 6, 6, 2).astype(np.float32))
    message = _message(tiny_overlapping_task(), {"image": str(path)})
    assert str(path) in message and "found 2 channels" in message and "4: FLAIR, T1, T1Gd, T2" in message
    message = _message(tiny_task(), {"image": str(path)})
    assert "found 2 channels" in message and "1: CT" in message


def test_nan_and_infinite_voxels_are_counted(tmp_path):
    image = np.random.rand(6, 6, 6).astype(np.float32)
    image[0, 0, :2], image[1, 1, 1] = np.nan, np.inf
    path = write_nifti(tmp_path / "nan.nii.gz", image)
    message = _message(tiny_task(), {"image": str(path)})
    assert str(path) in message and "3 of 216 voxels are NaN or infinite" in message


def test_unreadable_files(tmp_path):
    path = write_nifti(tmp_path / "cut.nii.gz", np.random.rand(20, 20, 20).astype(np.float32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    empty, noise = tmp_path / "empty.nii.gz", tmp_path / "noise.nii.gz"
    empty.write_bytes(b"")
    noise.write_bytes(b"not an image at all" * 40)
    folder = tmp_path / "folder"
    folder.mkdir()
    for bad in (path, empty, noise, folder):
        message = _message(tiny_task(), {"image": str(bad)})
        assert str(bad) in message and "cannot be read" in message
    assert "does not exist" in _message(tiny_task(), {"image": str(tmp_path / "none.nii.gz")})


def test_empty_volume_and_air(tmp_path):
    zeros = write_nifti(tmp_path / "zeros.nii.gz", np.zeros((6, 6, 6), np.float32))
    assert "empty volume" in _message(tiny_task(), {"image": str(zeros)})
    air = write_nifti(tmp_path / "air.nii.gz", np.random.uniform(-1000, -900, (6, 6, 6)).astype(np.float32))
    message = _message(tiny_task(), {"image": str(air)})
    assert str(air) in message and "no voxel above -175" in message


def test_unknown_label_values(tmp_path):
    image, mask = anatomy()
    mask[0, 0, 0], mask[0, 0, 1] = 9, 7
    data = write_case(tmp_path, image, mask, BASE)
    message = _message(native_task(), data)
    assert data["label"] in message and "7, 9" in message and "1 (liver)" in message and "3 (aorta)" in message


@pytest.mark.parametrize("value", [1.5, -1, MAX_VALUE + 1, float("nan")])
def test_values_that_no_label_can_have(value):
    with pytest.raises(ValueError, match="unknown label values"):
        encode(torch.full((1, 2, 2, 2), value), tiny_task())


def test_label_on_another_grid(tmp_path):
    image, mask = anatomy()
    data = write_case(tmp_path, image, mask, BASE)
    shifted = BASE.copy()
    shifted[0, 3] += 1
    for other, affine in [(mask[:-1], BASE), (mask, shifted), (mask, np.diag([2, 1.5, 2.9, 1.0]))]:
        path = write_nifti(tmp_path / "other.nii.gz", other, affine)
        message = _message(native_task(), {**data, "label": str(path)})
        assert str(path) in message and data["image"] in message and "not on the grid" in message
    rounded = BASE + 1e-4  # what a header's float32 may do
    path = write_nifti(tmp_path / "rounded.nii.gz", mask, rounded)
    assert torch.equal(
        apply(load(native_task(), label=True), {**data, "label": str(path)})["label"].as_tensor(),
        apply(load(native_task(), label=True), data)["label"].as_tensor(),
    )


def test_volume_thinner_than_one_network_slice(tmp_path):
    path = write_nifti(tmp_path / "thin.nii.gz", np.random.rand(40, 40, 2).astype(np.float32) * 100)
    task = tiny_task(spacing=[1, 1, 8])
    got = apply(load(task, label=False), {"image": str(path)})["image"]
    assert restore(torch.rand(4, *got.shape[1:]), got, task).shape == (40, 40, 2)


# Restoration -----------------------------------------------------------------------------------------------------


def _meta(spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> dict[str, object]:
    return {"affine": np.diag([*spacing, 1.0]), "original_affine": np.eye(4), "spatial_shape": shape}


def test_restoring_interpolates_probabilities_not_labels():
    """Between 0.9 and 0.2 at network voxels 4 mm apart, one half is crossed at 4 · 0.4 / 0.7 = 2.29 mm."""
    task = tiny_task(labels={"liver": label(1)})
    foreground = torch.tensor([0.9, 0.2]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    restored = restore(torch.cat([1 - foreground, foreground]), _meta((4, 1, 1), (5, 3, 3)), task)
    assert restored[:, 1, 1].tolist() == [1, 1, 1, 0, 0]


def test_slabs_give_what_one_piece_gives(monkeypatch):
    task = tiny_task()
    torch.manual_seed(0)
    probabilities = torch.rand(4, 8, 9, 7).softmax(0)
    meta = _meta((1.7, 1.3, 2.1), (13, 11, 14))
    whole = restore(probabilities, meta, task)
    monkeypatch.setattr("lib.volumes.transforms._SLAB_ELEMENTS", 4 * 13 * 11 * 2)
    assert np.array_equal(restore(probabilities, meta, task), whole)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)
    source = MetaTensor(probabilities, affine=torch.as_tensor(meta["affine"]))
    expected = resample(source, dst_affine=torch.eye(4), spatial_size=(13, 11, 14)).argmax(0).numpy()
    assert (expected == whole).mean() > 0.999


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_restoring_along_axes_gives_what_resampling_everything_gives(order, smooth):
    """Flipped, permuted, shifted and partly aligned grids. `smooth` maps are mostly decided without interpolating."""
    task, rng = tiny_task(), np.random.default_rng(sum(order) + 7 * smooth)
    torch.manual_seed(int(smooth))
    coarse = torch.rand(1, 4, *((3, 3, 3) if smooth else (14, 13, 12)))
    probabilities = torch.nn.functional.interpolate(coarse, size=(14, 13, 12), mode="trilinear")[0].mul(4).softmax(0)
    network = np.diag([1.5, 1.5, 2.0, 1.0])
    original = np.zeros((4, 4))
    original[:3, :3] = np.eye(3)[:, order] * rng.choice([-1, 1], 3) * [0.9, 1.5, 1.1]
    original[:3, 3] = np.where(original[:3, :3].sum(1) < 0, [20.0, 21.0, 23.0], [-2.0, 3.0, 0.2])
    original[3, 3] = 1
    shape = (25, 16, 30)
    restored = restore(probabilities, {"affine": network, "original_affine": original, "spatial_shape": shape}, task)

    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)
    source = MetaTensor(probabilities, affine=torch.as_tensor(network))
    dense = resample(source, dst_affine=torch.as_tensor(original), spatial_size=shape)
    assert isinstance(dense, MetaTensor)
    first, second = dense.as_tensor().topk(2, dim=0).values
    index = np.stack([*np.indices(shape), np.ones(shape)]).reshape(4, -1)
    at = (np.linalg.solve(network, original) @ index)[:3].reshape(3, *shape)
    size = np.array(probabilities.shape[1:]).reshape(3, 1, 1, 1)
    inside = ((at >= -0.5) & (at <= size - 0.5)).all(0)
    clear = ((first - second) > 1e-4).numpy() & inside
    assert inside.mean() > 0.2 and clear.sum() > 0.99 * inside.sum()
    assert np.array_equal(restored[clear], dense.argmax(0).numpy()[clear])
    assert not restored[((at < -0.51) | (at > size - 0.49)).any(0)].any()


def test_restore_refuses_other_channels():
    with pytest.raises(ValueError, match=r"\(4, h, w, d\)"):
        restore(torch.rand(3, 4, 4, 4), _meta((1, 1, 1), (4, 4, 4)), tiny_task())


def test_largest_components():
    volume = np.zeros((12, 12, 12), np.uint16)
    volume[0:4, 0:4, 0:4] = 1
    volume[4, 4, 4] = 1  # touches by a corner: the same component
    volume[9, 9, 9] = 1
    volume[6:8, 0, 0] = 300
    volume[10, 0, 0] = 300
    volume[0, 11, 11] = volume[11, 11, 11] = 2
    before = volume.copy()
    got = largest_components(volume, [1, 300, 7])
    assert np.array_equal(volume, before)
    assert (got == 1).sum() == 65 and got[4, 4, 4] == 1 and got[9, 9, 9] == 0
    assert (got == 300).sum() == 2 and got[10, 0, 0] == 0
    assert (got == 2).sum() == 2  # not asked for
    assert got.dtype == np.uint16

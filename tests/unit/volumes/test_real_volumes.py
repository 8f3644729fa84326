"""Real volumes through preprocessing and back to their own grid."""

from __future__ import annotations

import numpy as np

from lib.volumes.reading import read_volume
from lib.volumes.transforms import apply, load, restore
from support.helpers import label, one_hot, read_nifti, tiny_overlapping_task, tiny_task


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


AMOS = [
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate",
]  # fmt: skip


def _amos_task(spacing):
    return tiny_task(labels={name: label(i) for i, name in enumerate(AMOS, 1)}, spacing=spacing)


def test_real_ct_comes_back_on_its_own_grid(real_data):
    data = {
        "image": str(real_data / "abdomen_ct/ts-example_ct.nii.gz"),
        "label": str(real_data / "abdomen_ct/ts-example_label-amos15.nii.gz"),
    }
    truth = np.asarray(read_nifti(data["label"]).dataobj)
    for spacing, least in [((3.0, 3.0, 3.0), 1.0), ((1.5, 1.5, 2.0), 0.93)]:
        task = _amos_task(spacing)
        got = apply(load(task, label=True), data)
        assert np.allclose(np.diag(got["image"].affine.numpy())[:3], spacing)
        restored = restore(one_hot(got["label"].as_tensor(), 16), got["image"], task)
        assert restored.shape == truth.shape
        dice = {AMOS[v - 1]: _dice(restored == v, truth == v) for v in np.unique(truth)[1:]}
        assert min(dice.values()) >= least, dice


def test_real_dicom_series_with_a_label_in_another_orientation(real_data):
    image = real_data / "dicom_ct/ts-example-dicom-j2k"
    label_path = real_data / "dicom_ct/ts-example-dicom_label-ts117.nii.gz"
    truth = read_volume(label_path)[0].numpy()
    values = [int(v) for v in np.unique(truth)[1:]]
    groups = {"first": values[0::3], "second": values[1::3], "third": values[2::3]}
    task = tiny_task(
        labels={name: label(v[0], file_values=v[1:]) for name, v in groups.items()}, spacing=[0.9765625, 0.9765625, 2.0]
    )
    got = apply(load(task, label=True), {"image": str(image), "label": str(label_path)})
    restored = restore(one_hot(got["label"].as_tensor(), 4), got["image"], task)
    # The label is LAS, its image LPS: on the image's grid it is mirrored in its second axis.
    expected = np.zeros(truth.shape)
    for members in groups.values():
        expected[np.isin(truth, members)] = members[0]
    inside = restored > 0
    assert np.array_equal(restored[inside], expected[:, ::-1][inside])
    assert inside.sum() / (truth > 0).sum() > 0.999


def test_real_brain_has_four_channels(real_data):
    task = tiny_overlapping_task()
    folder = real_data / "brain_mr_4ch"
    got = apply(
        load(task, label=True),
        {
            "image": str(folder / "tcga-fg-6692_4ch-flair-t1-t1gd-t2.nii.gz"),
            "label": str(folder / "tcga-fg-6692_label-msd.nii.gz"),
        },
    )
    assert got["image"].shape[0] == 4 and got["label"].shape[0] == 3
    assert got["image"].shape[1:] == got["label"].shape[1:]
    assert max(got["image"].shape[1:]) < 240  # the empty surroundings of the skull-stripped brain are gone
    truth = np.asarray(read_nifti(folder / "tcga-fg-6692_label-msd.nii.gz").dataobj)
    assert np.array_equal(restore(got["label"].as_tensor(), got["image"], task), truth)

"""Where files place their voxels: as ITK, and so 3D Slicer, shows them, whatever their header says and how."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lib.stores.uploads.checks import check_label_file
from lib.volumes.masks import write_mask
from lib.volumes.nifti import true_suffix
from lib.volumes.reading import align_label, check_grid, check_image, read_header, read_volume
from support.helpers import read_nifti, tiny_task

SHAPE = (4, 5, 6)
BASE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 3.0, -100], [0, 0, 0, 1]])
MM, METRES, MICROMETRES, NO_UNIT, SECONDS = 2, 1, 3, 0, 8
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE)


def moved(change: str) -> np.ndarray:
    """BASE, changed."""
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    turn = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    shift, shear = np.eye(4), np.eye(4)
    shift[0, 3], shear[0, 1] = 40, 0.5
    mirror = np.diag([-1.0, 1, 1, 1])
    return {
        "same": BASE,
        "shifted": shift @ BASE,
        "turned": turn @ BASE,
        "scaled": BASE @ np.diag([1.2, 1, 1, 1]),
        "sheared": BASE @ shear,
        "mirrored": BASE @ mirror,
    }[change]


def write(
    path: Path, codes: tuple[int, int], sform: np.ndarray = BASE, unit: int = MM, quaternion=None, voxels=VOXELS
) -> Path:
    """A NIfTI file with BASE as its qform, or with the given quaternion."""
    header = nib.Nifti1Header()
    header.set_qform(BASE, codes[0])
    header.set_sform(sform, codes[1])
    header["pixdim"][1:4] = np.linalg.norm(BASE[:3, :3], axis=0)
    header["xyzt_units"] = unit
    if quaternion:
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = quaternion
    nib.save(nib.Nifti1Image(voxels, None, header), path)
    return path


def itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z) and RAS affine by SimpleITK alone."""
    image = sitk.ReadImage(str(path))
    ends = [image.TransformIndexToPhysicalPoint(i) for i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    points = np.array(ends) * [-1, -1, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = (points[1:] - points[0]).T, points[0]
    return sitk.GetArrayFromImage(image).T, affine


def ours(path: Path) -> np.ndarray:
    affine = read_volume(path).affine.numpy()
    assert np.array_equal(read_header(path).affine.numpy(), affine)
    return affine


CODES = [(q, s) for q in (0, 1, 2) for s in (0, 1, 2)] + [(1, 4), (3, 2)]


@pytest.mark.parametrize("change", ["same", "shifted", "turned", "scaled", "sheared", "mirrored"])
def test_nifti_lies_where_itk_shows_it_and_so_do_its_masks(tmp_path, change):
    """All pairs of codes: masks as NIfTI and NRRD lie on their image in ITK, in nibabel and here."""
    for codes in CODES:
        if change == "sheared" and codes[0] == 0 and codes[1]:
            continue  # ITK refuses it
        image = write(tmp_path / f"image{codes}.nii.gz", codes, moved(change))
        voxels, shown = itk(image)
        affine = ours(image)
        np.testing.assert_allclose(affine, shown, atol=1e-4, err_msg=str(codes))
        np.testing.assert_array_equal(read_volume(image)[0].numpy(), voxels)
        for suffix in (".nii.gz", ".nrrd"):
            mask = tmp_path / f"mask{codes}{suffix}"
            write_mask(mask, (VOXELS % 3).astype(np.uint8), affine, str(image), {})
            np.testing.assert_allclose(itk(mask)[1], shown, atol=1e-4, err_msg=f"{codes} {suffix}")
            np.testing.assert_allclose(ours(mask), shown, atol=1e-4)
            assert np.array_equal(align_label(read_volume(mask), read_volume(image))[0].numpy(), VOXELS % 3)
        nifti = read_nifti(tmp_path / f"mask{codes}.nii.gz")
        np.testing.assert_array_equal(nifti.affine, read_nifti(image).affine)


def test_without_forms_by_hand(tmp_path):
    """No code: ITK starts at 0 and runs to the right's and the front's opposite: LPS, by the voxel sizes alone."""
    assert np.array_equal(ours(write(tmp_path / "i.nii", (0, 0))), np.diag([-2, -1.5, 3, 1]))


def test_sheared_matrix_alone_stays_sheared(tmp_path):
    """ITK refuses it; it is read as it stands, and restored by resampling every voxel."""
    np.testing.assert_allclose(ours(write(tmp_path / "i.nii", (0, 1), moved("sheared"))), moved("sheared"), atol=1e-4)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0), (1, 2)])
@pytest.mark.parametrize(
    ("unit", "factor"), [(MM, 1), (METRES, 1000), (MICROMETRES, 0.001), (NO_UNIT, 1), (SECONDS, 1)]
)
def test_the_headers_unit_is_taken_into_millimetres(tmp_path, codes, unit, factor):
    image = write(tmp_path / "image.nii.gz", codes, unit=unit)
    millimetres = np.diag([factor] * 3 + [1]) @ (BASE if any(codes) else np.diag([-2, -1.5, 3, 1]))
    np.testing.assert_allclose(ours(image), millimetres, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(itk(image)[1], millimetres, rtol=1e-5, atol=1e-9)
    for suffix in (".nii.gz", ".nrrd"):
        write_mask(tmp_path / f"mask{suffix}", VOXELS.astype(np.uint8), ours(image), str(image), {})
        np.testing.assert_allclose(itk(tmp_path / f"mask{suffix}")[1], millimetres, rtol=1e-5, atol=1e-9)
    # nibabel, which ignores units, sees the mask on the image too.
    assert np.array_equal(read_nifti(tmp_path / "mask.nii.gz").affine, read_nifti(image).affine)


def test_rounded_quaternion(tmp_path):
    """0.8² + 0.60001² + 0.0001² is 1.00001: nibabel refuses it, ITK shortens it."""
    image = write(tmp_path / "image.nii.gz", (1, 0), quaternion=(0.8, 0.60001, 0.0001))
    with pytest.raises(ValueError, match="w2 should be positive"):
        read_nifti(image)
    np.testing.assert_allclose(ours(image), itk(image)[1], atol=1e-4)
    write_mask(tmp_path / "mask.nii.gz", VOXELS.astype(np.uint8), ours(image), str(image), {})
    np.testing.assert_allclose(read_nifti(tmp_path / "mask.nii.gz").affine, itk(image)[1], atol=1e-4)
    np.testing.assert_allclose(itk(tmp_path / "mask.nii.gz")[1], itk(image)[1], atol=1e-5)


@pytest.mark.parametrize(("real", "named"), [(".nii.gz", ".nii"), (".nii", ".nii.gz"), (".nii.gz", ".NII.GZ")])
def test_files_are_read_by_what_they_hold(tmp_path, caplog, real, named):
    image = write(tmp_path / f"real{real}", (1, 2), moved("shifted"))
    wrong = tmp_path / f"named{named}"
    wrong.write_bytes(image.read_bytes())
    assert true_suffix(wrong) == real
    assert np.array_equal(read_volume(wrong).numpy(), read_volume(image).numpy())
    assert np.array_equal(ours(wrong), ours(image))
    told = f"{wrong} is {'compressed' if real == '.nii.gz' else 'not compressed'}"
    assert (told in caplog.text) == (named != ".NII.GZ")
    write_mask(tmp_path / "mask.nii.gz", VOXELS.astype(np.uint8), ours(wrong), str(wrong), {})
    assert np.array_equal(read_nifti(tmp_path / "mask.nii.gz").affine, read_nifti(image).affine)


def test_name_that_is_not_utf8(tmp_path):
    folder = Path(str(tmp_path) + "/h\udce9pital")
    folder.mkdir()
    assert np.array_equal(ours(write(folder / "image.nii.gz", (1, 1))), BASE)


# Labels ----------------------------------------------------------------------------------------------------------


def drawn(path: Path, affine: np.ndarray) -> Path:
    """A label as a user of nibabel writes it: one form."""
    nib.save(nib.Nifti1Image((VOXELS % 4).astype(np.uint8), affine), path)
    return path


@pytest.mark.parametrize("change", ["shifted", "turned", "scaled"])
def test_label_that_was_drawn_on_the_other_form(tmp_path, caplog, change):
    image = write(tmp_path / "image.nii.gz", (1, 2), moved(change))
    on_qform = align_label(read_volume(drawn(tmp_path / "q.nii.gz", BASE)), read_volume(image))
    assert not caplog.text
    on_sform = align_label(read_volume(drawn(tmp_path / "s.nii.gz", moved(change))), read_volume(image))
    assert np.array_equal(on_sform[0].numpy(), VOXELS % 4)
    assert np.array_equal(on_sform.numpy(), on_qform.numpy()) and np.array_equal(
        on_sform.affine, read_volume(image).affine
    )
    assert (
        f"s.nii.gz lies on its image only if placed otherwise than ITK and 3D Slicer do: {image} by sform"
        in caplog.text
    )


def test_label_that_fits_neither_form_names_the_cause(tmp_path):
    image = write(tmp_path / "image.nii.gz", (1, 2), moved("shifted"))
    elsewhere = BASE.copy()
    elsewhere[1, 3] += 7
    with pytest.raises(ValueError, match="not on the grid") as error:
        align_label(read_volume(drawn(tmp_path / "label.nii.gz", elsewhere)), read_volume(image))
    assert f"the header of {image} places it in several ways" in str(error.value)
    assert "sform up to 40 mm" in str(error.value)
    with pytest.raises(ValueError, match="the header of image 'a' places it in several ways") as error:
        check_label_file(tmp_path / "label.nii.gz", image, "a")
    assert str(tmp_path) not in str(error.value)


def test_label_that_fits_in_two_voxel_orders_is_refused(tmp_path):
    """The sform is the qform mirrored about the middle: a label on it may be meant mirrored, or not."""
    middle = BASE @ np.array([[-1.0, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = write(tmp_path / "image.nii.gz", (1, 2), middle)
    with pytest.raises(ValueError, match="fits its image .* in two ways, in different voxel orders"):
        align_label(read_volume(drawn(tmp_path / "label.nii.gz", middle)), read_volume(image))


def test_label_of_an_image_in_micrometres_by_a_program_that_ignores_units(tmp_path):
    image = write(tmp_path / "image.nii.gz", (1, 1), unit=MICROMETRES)
    label = align_label(read_volume(drawn(tmp_path / "label.nii.gz", read_nifti(image).affine)), read_volume(image))
    assert np.array_equal(label[0].numpy(), VOXELS % 4)


# NRRD ------------------------------------------------------------------------------------------------------------

PLACE = "space directions: (2,0,0) (0,1.5,0) (0,0,3)\nspace origin: (-30,12,-100)"


def write_nrrd(path: Path, place: str, sizes: str = "4 5 6", voxels: np.ndarray = VOXELS) -> Path:
    """A header by hand: `place` stands as it is."""
    fields = f"type: int16\ndimension: {len(sizes.split())}\nsizes: {sizes}\nencoding: raw\nendian: little\n{place}"
    path.write_bytes(f"NRRD0004\n{fields}\n\n".encode() + voxels.tobytes("F"))
    return path


SPACES = {
    **dict.fromkeys(["left-posterior-superior", "LPS", "lps", "scanner-xyz", "3D-right-handed"], (-1, -1)),
    **dict.fromkeys(["right-anterior-superior", "RAS", "right anterior superior"], (1, 1)),
    **dict.fromkeys(["left-anterior-superior", "LAS"], (-1, 1)),
}


@pytest.mark.parametrize("space", SPACES)
def test_spaces_of_nrrd(tmp_path, space):
    """By hand: of LPS the first two axes turn, of RAS none, of LAS the first."""
    file = write_nrrd(tmp_path / "image.nrrd", f"space: {space}\n{PLACE}")
    expected = np.diag([*SPACES[space], 1, 1]) @ BASE
    np.testing.assert_allclose(ours(file), expected)
    np.testing.assert_allclose(itk(file)[1], expected)
    assert np.array_equal(read_volume(file)[0].numpy(), VOXELS)
    write_mask(tmp_path / "mask.nrrd", VOXELS.astype(np.uint8), ours(file), str(file), {})
    write_mask(tmp_path / "mask.nii.gz", VOXELS.astype(np.uint8), ours(file), str(file), {})
    for mask in ("mask.nrrd", "mask.nii.gz"):
        np.testing.assert_allclose(itk(tmp_path / mask)[1], expected)
    np.testing.assert_allclose(read_nifti(tmp_path / "mask.nii.gz").affine, expected)


@pytest.mark.parametrize(
    ("place", "sizes", "origin"),
    [
        (f"space dimension: 3\n{PLACE}", (2, 1.5, 3), (-30, 12, -100)),
        ("spacings: 2 1.5 3", (2, 1.5, 3), (0, 0, 0)),
        ("", (1, 1, 1), (0, 0, 0)),
    ],
)
def test_nrrd_without_a_space_is_in_lps_and_says_so(tmp_path, caplog, place, sizes, origin):
    file = write_nrrd(tmp_path / "image.nrrd", place or "content: x")
    np.testing.assert_allclose(ours(file), np.diag([-1, -1, 1, 1]) @ np.array(_affine(sizes, origin)))
    np.testing.assert_allclose(itk(file)[1], ours(file))
    assert f"{file} names no space: taken as left-posterior-superior" in caplog.text


def _affine(sizes, origin):
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize("first", [True, False])
def test_list_of_volumes_in_nrrd_is_channels(tmp_path, first):
    other = VOXELS + 1000
    directions = "(2,0,0) (0,1.5,0) (0,0,3)"
    place, kinds = (
        (f"none {directions}", "list domain domain domain")
        if first
        else (
            f"{directions} none",
            "domain domain domain list",
        )
    )
    file = write_nrrd(
        tmp_path / "image.nrrd",
        f"space: RAS\nspace directions: {place}\nspace origin: (-30,12,-100)\nkinds: {kinds}",
        "2 4 5 6" if first else "4 5 6 2",
        np.stack([VOXELS, other], 0 if first else -1),
    )
    image = read_volume(file)
    assert np.array_equal(image.numpy(), np.stack([VOXELS, other]))
    assert np.array_equal(ours(file), BASE) and read_header(file).shape == image.shape
    with pytest.raises(
        ValueError, match=r"expected a label with one channel and three axes, found shape \(2, 4, 5, 6\)"
    ):
        align_label(image, read_volume(write(tmp_path / "i.nii", (1, 1))))


@pytest.mark.parametrize("compressed", [False, True])
def test_metaimage_of_two_channels_on_an_oblique_grid(tmp_path, compressed):
    image = sitk.GetImageFromArray(np.stack([VOXELS.T, VOXELS.T + 1000], -1), isVector=True)
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    image.SetSpacing((2, 1.5, 3))
    image.SetOrigin((-30, 12, -100))
    sitk.WriteImage(image, str(tmp_path / "image.mha"), compressed)
    # Columns by hand: the direction's times 2, 1.5 and 3 mm; x and y turn from LPS to RAS.
    expected = np.array([[-1.6, 0.9, 0, 30], [-1.2, -1.2, 0, -12], [0, 0, 3, -100], [0, 0, 0, 1]])
    np.testing.assert_allclose(ours(tmp_path / "image.mha"), expected, atol=1e-9)
    assert np.array_equal(read_volume(tmp_path / "image.mha").numpy(), np.stack([VOXELS, VOXELS + 1000]))


def test_nrrd_that_cannot_be_read_says_why(tmp_path):
    nameless = write_nrrd(tmp_path / "a.nrrd", f"space: RPS\n{PLACE}")
    with pytest.raises(ValueError, match='a.nrrd: cannot be read as an image: .*couldn\'t parse space "RPS"'):
        read_volume(nameless)
    short = write_nrrd(tmp_path / "b.nrrd", f"space: LPS\n{PLACE}", voxels=VOXELS[..., :3])
    with pytest.raises(ValueError, match="b.nrrd: cannot be read as an image: .*60 .*not 120"):
        read_volume(short)


# The network's grid ----------------------------------------------------------------------------------------------


def test_grid_beyond_memory_is_refused_before_it_is_made(tmp_path):
    image = write(tmp_path / "image.nii.gz", (1, 1), unit=METRES)
    with pytest.raises(ValueError) as error:
        check_grid(image, read_header(image).shape, read_header(image).affine.numpy(), tiny_task())
    message = str(error.value)
    assert f"{image}: too large for the network's grid: 8000 x 7500 x 18000 voxels with 1 channel(s)" in message
    assert "at most 1073741824 numbers" in message
    assert "its voxels measure 2000 x 1500 x 3000 mm, the task's 1 x 1 x 1 mm; probably the unit" in message


def test_volume_smaller_than_one_network_voxel_is_refused(tmp_path):
    image = read_volume(write(tmp_path / "image.nii.gz", (1, 1), unit=MICROMETRES))
    with pytest.raises(ValueError, match="too small: all of it, 0.008 x 0.0075 x 0.018 mm, is less than one network"):
        check_image(image, tiny_task())
    # In a task made for such images they are as good as any.
    check_image(image, tiny_task(spacing=[0.002, 0.0015, 0.003]))


def test_gzip_named_nii_is_checked_as_one(tmp_path):
    """A bomb or a cut-off file does not pass because of its name."""
    image = write(tmp_path / "image.nii.gz", (1, 1))
    whole = gzip.compress((write(tmp_path / "label.nii", (1, 1))).read_bytes())
    wrong = tmp_path / "wrong.nii"
    wrong.write_bytes(whole)
    assert check_label_file(wrong, image, "image").shape == (1, *SHAPE)
    wrong.write_bytes(whole[:-8] + b"abcd" + whole[-4:])
    with pytest.raises(ValueError, match="damaged or cut off"):
        check_label_file(wrong, image, "image")

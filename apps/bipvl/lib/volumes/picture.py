"""A picture of a volume and of masks on it: three planes, one row per mask, in the task's colours.

Planes are shown as radiologists see them: the patient's right on the left of axial and coronal planes, the face to the
left on sagittal ones, head up. Everything is placed by affine, so a mask stored in another orientation than its image
gives the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from lib.tasks import Task
from lib.volumes.reading import align_label, check_image, read_volume, rounded, unknown_values

WIDTH = 1000  # of the picture, in pixels
ROW_LIMIT = 480  # height of a row of planes
GAP, TITLE, LEGEND_LINE, LEGEND_COLUMNS = 8, 24, 22, 6
DPI = 100
OPACITY = 0.4  # inside a mask; its edge is opaque
MISSED, EXTRA, CONFUSED = (66, 133, 244), (234, 88, 12), (217, 70, 239)  # colours of differences


def picture(task: Task, image: Path, masks: Mapping[str, Path], out: Path) -> None:
    """Draw axial, coronal and sagittal planes through the centre of the first mask: a row for the image, one per mask.

    Args:
        task: colours and names of the labels, and the grey window: `intensity` if its mode is `range`, else the 1st
            to the 99th percentile of the voxels that are not 0. Of several channels the first is shown.
        image: a volume of the task.
        masks: title of the row to label file, on the image's grid in any orientation.
        out: PNG file to write, `WIDTH` pixels wide.

    Raises:
        ValueError: a file cannot be read, a mask lies on another grid, or holds a value that the task does not know.
    """
    grey, spacing, labels = read_for_picture(task, image, masks)
    centre = _centre(next(iter(labels.values()), np.zeros(grey.shape, int)))
    shown = [n for v, n in task.value_names.items() if any((mask == v).any() for mask in labels.values())]
    names = [name for name in task.labels if name in shown]
    _draw(task, grey, spacing, centre, labels, names, out)


def read_for_picture(task: Task, image: Path, masks: Mapping[str, Path]) -> tuple[NDArray, NDArray, dict[str, NDArray]]:
    """An image as grey values in [0, 1], its voxel size in mm, and label values by title; all axes RAS.

    Raises:
        ValueError: as `picture`.
    """
    volume = read_volume(image)
    check_image(volume, task)
    affine = volume.affine.numpy()
    spacing = np.abs(to_ras_axes(affine, np.linalg.norm(affine[:3, :3], axis=0)))
    grey = window(to_ras(volume[0].numpy(), affine), task)
    labels = {}
    for title, path in masks.items():
        values = rounded(align_label(read_volume(path), volume)[0].numpy())
        unknown = sorted(set(np.unique(values)) - {0, *task.value_names})
        if unknown:
            raise ValueError(unknown_values(unknown, task, str(path)))
        labels[title] = to_ras(values, affine).astype(int)
    return grey, spacing, labels


def _draw(
    task: Task,
    grey: NDArray,
    spacing: NDArray,
    centre: tuple[int, int, int],
    labels: Mapping[str, NDArray],
    names: list[str],
    out: Path,
) -> None:
    """Lay the planes out pixel by pixel, so that one scale holds for all of them."""
    x, y, z = np.array(grey.shape) * spacing  # mm
    scale = min((WIDTH - 4 * GAP) / (2 * x + y), ROW_LIMIT / max(y, z))
    row_height = round(max(y, z) * scale)
    legend_height = LEGEND_LINE * -(-len(names) // LEGEND_COLUMNS) + GAP
    height = (1 + len(labels)) * (TITLE + row_height + GAP) + legend_height
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    left_over = WIDTH - round((2 * x + y) * scale) - 2 * GAP

    top = 0
    for title, mask in {task.channels[0]: None, **labels}.items():
        figure.text(GAP / WIDTH, 1 - (top + TITLE / 2) / height, title, va="center", fontsize=11)
        top += TITLE
        left = left_over // 2
        for number in range(3):
            tall, wide = (round(mm * scale) for mm in ((y, x), (z, x), (z, y))[number])
            pixels = np.repeat(resized(plane(grey, centre, number), (tall, wide), 1)[..., None], 3, axis=-1)
            if mask is not None:
                pixels = overlay(pixels, resized(plane(mask, centre, number), (tall, wide), 0), task)
            offset = top + (row_height - tall) // 2
            axes = figure.add_axes((left / WIDTH, 1 - (offset + tall) / height, wide / WIDTH, tall / height))
            axes.imshow(pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            left += wide + GAP
        top += row_height + GAP
    if names:
        patches = [Patch(color="#" + bytes(task.labels[name].color).hex(), label=name) for name in names]
        columns = min(LEGEND_COLUMNS, len(names))
        figure.legend(handles=patches, loc="lower center", ncols=columns, fontsize=9, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def to_ras(array: NDArray, affine: NDArray) -> NDArray:
    """Turn the stored axes so that indices grow to the right, to the front and upward."""
    return orientations.apply_orientation(array, orientations.io_orientation(affine))


def to_ras_axes(affine: NDArray, values: NDArray) -> NDArray:
    """One value per stored axis, put into the order of the RAS axes."""
    axes = orientations.io_orientation(affine)[:, 0].astype(int)
    return values[np.argsort(axes)]


def window(volume: NDArray, task: Task) -> NDArray:
    if task.intensity.mode == "range":
        assert task.intensity.low is not None and task.intensity.high is not None
        low, high = task.intensity.low, task.intensity.high
    else:
        low, high = np.percentile(volume[volume != 0], (1, 99))
    return np.clip((volume - low) / max(high - low, 1e-6), 0, 1)


def _centre(mask: NDArray) -> tuple[int, int, int]:
    """The mean voxel of a mask; the middle of the volume if it is empty."""
    places = np.argwhere(mask)
    i, j, k = (np.round(places.mean(0)) if len(places) else np.array(mask.shape) // 2).astype(int).tolist()
    return i, j, k


def plane(volume: NDArray, centre: Sequence[int], number: int) -> NDArray:
    """Axial (0), coronal (1) or sagittal (2) plane of a RAS volume, rows from the top, columns from the left."""
    taken = np.take(volume, centre[2 - number], axis=2 - number)
    return taken[::-1, ::-1].T


def resized(plane: NDArray, size: tuple[int, int], order: int) -> NDArray:
    """Linear (order 1) or nearest (0) interpolation to whole pixels."""
    zoom = np.array(size) / plane.shape
    return ndimage.zoom(plane, zoom, order=order, mode="nearest", grid_mode=True)


def overlay(pixels: NDArray, labels: NDArray, task: Task) -> NDArray:
    """Colour RGB pixels (rows, columns, 3) in [0, 1] by label; a pixel with another label beside it is an edge."""
    box = ndimage.generate_binary_structure(2, 2)
    edge = ndimage.maximum_filter(labels, footprint=box) != ndimage.minimum_filter(labels, footprint=box)
    strength = np.where(edge, 1.0, OPACITY)[..., None] * (labels > 0)[..., None]
    color = np.zeros((labels.max() + 1, 3))
    for value, name in task.value_names.items():
        if value < len(color):
            color[value] = np.array(task.labels[name].color) / 255
    return pixels * (1 - strength) + color[labels] * strength


def opposed(pixels: NDArray, reference: NDArray, found: NDArray) -> NDArray:
    """Colour RGB pixels (rows, columns, 3) by how two label planes differ: missed, too much, or another label."""
    pixels = pixels.copy()
    for color, where in (
        (MISSED, (reference > 0) & (found == 0)),
        (EXTRA, (reference == 0) & (found > 0)),
        (CONFUSED, (reference > 0) & (found > 0) & (reference != found)),
    ):
        pixels[where] = 0.25 * pixels[where] + 0.75 * np.array(color) / 255
    return pixels

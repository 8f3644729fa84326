"""A picture of a volume and of masks on it: three planes, one row a mask, in the task's colours.

Planes are shown as radiologists see them: the patient's right on the left of axial and coronal planes, the face to the
left on sagittal ones, head up. Everything is placed by affine, so a mask stored in another orientation than its image
gives the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from lib.tasks import Task
from lib.volumes import align_label, check_image, read_volume

WIDTH = 1000  # of the picture, in pixels
ROW_LIMIT = 480  # height of a row of planes
GAP, TITLE, LEGEND_LINE, LEGEND_COLUMNS = 8, 24, 22, 6
DPI = 100
OPACITY = 0.4  # inside a mask; its edge is opaque


def picture(task: Task, image: Path, masks: Mapping[str, Path], out: Path) -> None:
    """Draw axial, coronal and sagittal planes through the centre of the first mask: a row for the image, one a mask.

    Args:
        task: colours and names of the labels, and the grey window: `intensity` where its mode is `range`, else the 1st
            to the 99th percentile of the voxels that are not 0. Of several channels the first is shown.
        image: a volume of the task.
        masks: title of the row to label file, on the image's grid in any orientation.
        out: PNG file to write, `WIDTH` pixels wide.

    Raises:
        ValueError: a file cannot be read, a mask lies on another grid, or holds a value that the task does not know.
    """
    volume = read_volume(image)
    check_image(volume, task)
    affine = volume.affine.numpy()
    spacing = np.abs(_to_ras_axes(affine, np.linalg.norm(affine[:3, :3], axis=0)))
    grey = _window(_to_ras(volume[0].numpy(), affine), task)
    labels = {}
    for title, path in masks.items():
        values = align_label(read_volume(path), volume)[0].numpy()
        unknown = sorted(set(np.unique(values)) - {0, *task.value_names})
        if unknown:
            valid = ", ".join(f"{value} ({name})" for value, name in task.value_names.items())
            raise ValueError(f"{path}: unknown label value {unknown[0]:g}; task {task.name!r} knows {valid}")
        labels[title] = _to_ras(values, affine).astype(int)
    centre = _centre(next(iter(labels.values()), np.zeros(grey.shape, int)))
    shown = [n for v, n in task.value_names.items() if any((mask == v).any() for mask in labels.values())]
    names = [name for name in task.labels if name in shown]
    _draw(task, grey, spacing, centre, labels, names, out)


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
        for plane in range(3):
            tall, wide = (round(mm * scale) for mm in ((y, x), (z, x), (z, y))[plane])
            pixels = np.repeat(_resized(_plane(grey, centre, plane), (tall, wide), 1)[..., None], 3, axis=-1)
            if mask is not None:
                pixels = _overlay(pixels, _resized(_plane(mask, centre, plane), (tall, wide), 0), task)
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


def _to_ras(array: NDArray, affine: NDArray) -> NDArray:
    """Turn the stored axes so that indices grow to the right, to the front and upward."""
    return orientations.apply_orientation(array, orientations.io_orientation(affine))


def _to_ras_axes(affine: NDArray, values: NDArray) -> NDArray:
    """One value a stored axis, put into the order of the RAS axes."""
    axes = orientations.io_orientation(affine)[:, 0].astype(int)
    return values[np.argsort(axes)]


def _window(volume: NDArray, task: Task) -> NDArray:
    if task.intensity.mode == "range":
        assert task.intensity.low is not None and task.intensity.high is not None
        low, high = task.intensity.low, task.intensity.high
    else:
        low, high = np.percentile(volume[volume != 0], (1, 99))
    return np.clip((volume - low) / max(high - low, 1e-6), 0, 1)


def _centre(mask: NDArray) -> tuple[int, int, int]:
    """The mean voxel of a mask; the middle of the volume where it is empty."""
    places = np.argwhere(mask)
    i, j, k = (np.round(places.mean(0)) if len(places) else np.array(mask.shape) // 2).astype(int).tolist()
    return i, j, k


def _plane(volume: NDArray, centre: tuple[int, int, int], plane: int) -> NDArray:
    """Axial (0), coronal (1) or sagittal (2) plane of a RAS volume, rows from the top, columns from the left."""
    taken = np.take(volume, centre[2 - plane], axis=2 - plane)
    return taken[::-1, ::-1].T


def _resized(plane: NDArray, size: tuple[int, int], order: int) -> NDArray:
    """Linear (order 1) or nearest (0) interpolation to whole pixels."""
    zoom = np.array(size) / plane.shape
    return ndimage.zoom(plane, zoom, order=order, mode="nearest", grid_mode=True)


def _overlay(pixels: NDArray, labels: NDArray, task: Task) -> NDArray:
    """Colour RGB pixels (rows, columns, 3) in [0, 1] by label; a pixel with another label beside it is an edge."""
    box = ndimage.generate_binary_structure(2, 2)
    edge = ndimage.maximum_filter(labels, footprint=box) != ndimage.minimum_filter(labels, footprint=box)
    strength = np.where(edge, 1.0, OPACITY)[..., None] * (labels > 0)[..., None]
    color = np.zeros((labels.max() + 1, 3))
    for value, name in task.value_names.items():
        if value < len(color):
            color[value] = np.array(task.labels[name].color) / 255
    return pixels * (1 - strength) + color[labels] * strength

"""The scans that the quickstart starts with.

python -m lib.app.examples hippocampus|phantom FOLDER        (with apps/bipvl on PYTHONPATH)
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lib.files import FINAL, write_atomic
from lib.volumes.phantoms.studies import write_studies

SHIPPED = Path(__file__).resolve().parents[2] / "shipped"


class Example(str, Enum):
    """Which scans: MR crops that come with the app, or generated CT-like ones."""

    HIPPOCAMPUS = "hippocampus"
    PHANTOM = "phantom"


TASKS = {Example.HIPPOCAMPUS: "hippocampus-mr", Example.PHANTOM: "quickstart"}


def fill(
    example: Annotated[Example, typer.Argument(help="which scans")],
    folder: Annotated[Path, typer.Argument(help="where to write them, as MONAI Label's local datastore has them")],
) -> None:
    """Write the scans of an example into a folder, and the labels of four; what is there is left alone."""
    if example is Example.PHANTOM:
        write_studies(folder)
    else:
        copy_studies(SHIPPED / TASKS[example], folder)


def copy_studies(source: Path, folder: Path) -> list[Path]:
    """Copy `<source>/images` and `<source>/labels` as MONAI Label's local datastore lays them out.

    Existing images and labels are left alone. Each file appears complete or not at all.

    Returns:
        The paths of all images, in order.

    Raises:
        FileNotFoundError: no images in the source.
    """
    images = sorted((source / "images").glob("*.nii.gz"))
    if not images:
        raise FileNotFoundError(f"{source}: the example's images are missing; get the whole repository")
    copies = [folder / image.name for image in images]
    # The image is written last: where it exists, the case is complete, and a label deleted since stays deleted.
    for image, copy in zip(images, copies, strict=True):
        if copy.exists():
            continue
        label = source / "labels" / image.name
        if label.is_file():
            _copy(label, folder / "labels" / FINAL / image.name)
        _copy(image, copy)
    return copies


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
        write_atomic(target, lambda file: file.write(content))


if __name__ == "__main__":
    typer.run(fill)

"""`labels` on the command line: what can be done to all labels of a folder at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lib.stores.local import LocalStore
from lib.stores.renaming import Renaming
from lib.tasks import load_task

app = typer.Typer(help="Rename a class in the labels of a folder.", no_args_is_help=True)
console = Console()


@app.callback()
def _group() -> None:
    """Rename a class in the labels of a folder."""


@app.command()
def rename(
    old: Annotated[str, typer.Argument(help="earlier name")],
    new: Annotated[str, typer.Argument(help="new name, as in the task file")],
    task: Annotated[str, typer.Option("--task", help="name of a shipped task, or path of your own task file")],
    data: Annotated[str, typer.Option("--data", help="MONAI Label folder, with labels in labels/")],
    yes: Annotated[bool, typer.Option("--yes", help="do it; without it, only list what would change")] = False,
) -> None:
    """Let the labels of a folder follow a class that was renamed in its task. Voxels and files in history stay."""
    if data.startswith(("http://", "https://")):
        raise ValueError(
            f"{data}: the labels of an archive are DICOM SEGs, which stay as they were stored: they do not count for a "
            "class under its new name. Keep its name in the task file, or submit these labels again"
        )
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"{data}: not a folder of studies; in a JSON list replace the name under 'annotated' by hand")
    chosen = load_task(task)
    places = LocalStore(folder, tasks=[chosen]).rename_class(Renaming(old, new, chosen), only_list=not yes)
    for place in places:
        console.print(place, highlight=False, markup=False)
    if yes:
        console.print(f"{len(places)} label(s) now say {new!r} instead of {old!r}.", highlight=False)
    else:
        console.print(
            f"{len(places)} label(s) would change; nothing was changed. To change them, add --yes.", highlight=False
        )

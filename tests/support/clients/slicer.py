"""What 3D Slicer's module MONAILabel does, without its windows: the requests it makes, the values it reads out of its
option table, and how it takes masks into its scene and labels out of it. Written after reading the module and the parts
of Slicer that it calls (SampleData, vtkSlicerSegmentationsModuleLogic).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import nibabel as nib
import nrrd
import numpy as np
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from support.helpers import read_nifti

SECTIONS = {"infer": "models", "train": "trainers", "activelearning": "strategies", "scoring": "scoring"}
LPS = np.diag([-1, -1, 1, 1])


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine (RAS) of a NIfTI or NRRD file, read by other code than the server writes with."""
    if str(path).endswith(".nrrd"):
        voxels, header = nrrd.read(str(path))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
        assert header["space"] == "left-posterior-superior"
        return voxels, LPS @ affine
    image = read_nifti(path)
    return np.asarray(image.dataobj), image.affine


class Slicer:
    """One annotator with an open scene.

    Args:
        url: what is typed into the server's field.
        folder: for temporary files and the cache of downloads.
        headers: added to every request, as a network between client and server might.
        login: name and password, typed into the login window.
        shared: whether this machine sees the server's files under the same paths, as on the server itself.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        client_id: str = "user-xyz",
        headers: dict[str, str] | None = None,
        login: tuple[str, str] | None = None,
        shared: bool = False,
    ) -> None:
        self.url, self.folder, self.client_id, self.login, self.shared = url, folder, client_id, login, shared
        self.headers, self.extension = headers or {}, ".nii.gz"
        self.segments: dict[str, np.ndarray] = {}
        self.sample: dict[str, Any] = {}
        self.volume, self.affine = np.empty(0), np.eye(4)
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        self.connect()

    def client(self) -> MONAILabelClient:
        """A new one for every request, logged in if the server asks for it."""
        client = MONAILabelClient(self.url, str(self.folder), self.client_id)
        client._headers = dict(self.headers)
        if client.auth_enabled() and self.login:
            client.update_auth(client.auth_token(*self.login))
        return client

    # Options ------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """The green button."""
        self.info = self.client().info()
        assert not self.info.get("config"), "the module takes this for an old server"

    def options(self, section: str, name: str, **typed: Any) -> dict[str, Any]:
        """What the option table sends, after a user typed or chose something in it."""
        config = self.info[SECTIONS[section]][name].get("config", {})
        assert set(typed) <= set(config), "the table has no such row"
        sent: dict[str, Any] = {}
        for key, value in config.items():
            kind, widget = widget_of(value)
            if key in typed:
                widget = typed[key]
                assert kind != "combo" or widget in value, "a combo box offers its entries only"
            if isinstance(value, bool):
                sent[key] = bool(widget)
            elif isinstance(value, int):
                sent[key] = int(widget) if widget else 0
            elif isinstance(value, float):
                sent[key] = float(widget) if widget else 0.0
            else:
                sent[key] = widget
        return sent

    # The panel's buttons ------------------------------------------------------------------------------------------

    def next_sample(self, strategy: str = "first") -> str | None:
        """Next Sample: ask, then load the file or download it without the login. Empty segments for all labels."""
        sample = self.client().next_sample(strategy, self.options("activelearning", strategy))
        if not sample.get("id"):
            return None
        path = sample.get("path")
        if not (self.shared and path and os.path.exists(path)):
            uri = f"{self.url}/datastore/image?image={quote_plus(sample['id'])}"
            path = self.download(uri, sample.get("name", sample["id"]), sample.get("checksum"))
        self.open(str(path), {**sample, "session": False})
        return sample["id"]

    def download(self, uri: str, name: str, checksum: str | None) -> Path:
        """SampleData: a file of this name in the cache is taken unless a checksum says that it is another one."""
        path = self.folder / "cache" / name
        algorithm, _, digest = (checksum or "").partition(":")
        if path.exists() and checksum and hashlib.new(algorithm, path.read_bytes()).hexdigest() != digest:
            path.unlink()
        if not path.exists():
            with urllib.request.urlopen(urllib.request.Request(uri, headers=self.headers)) as answer:
                path.write_bytes(answer.read())
            if checksum:
                assert hashlib.new(algorithm, path.read_bytes()).hexdigest() == digest
        return path

    def open(self, path: str, sample: dict[str, Any]) -> None:
        """Put a volume into an empty scene. Slicer knows a file by its ending."""
        assert re.search(r"\.(nii\.gz|nii|nrrd|mha)$", path), f"Slicer cannot tell what {path} is"
        self.volume, self.affine = read(path)
        self.sample = sample
        self.segments = {name: np.zeros(self.volume.shape, bool) for name in self.info["labels"]}

    def open_own(self, path: str | Path, name: str) -> None:
        """A volume that the user loaded: not on the server yet, and known by the name of its node."""
        self.open(str(path), {"id": name, "session": True, "file": str(path)})

    def upload(self) -> None:
        """Send the user's own volume, before the first mask or at submission."""
        if self.sample["session"]:
            self.client().upload_image(self.sample["file"], self.sample["id"])
            self.sample["session"] = False

    def run(self, model: str, **typed: Any) -> dict[str, Any]:
        """Auto Segmentation: the mask's values go to segments by position, whatever was in them is gone."""
        self.upload()
        params = {**self.options("infer", model, **typed), "result_extension": ".nrrd", "result_dtype": "uint8"}
        file, result = self.client().infer(model, self.sample["id"], params)
        self.take_in(file, result.get("label_names") or self.info["models"][model]["labels"])
        return result

    def click(
        self, model: str, label: str, foreground: list[list[int]], background: list[list[int]], **more: Any
    ) -> dict[str, Any]:
        """A point of the deepgrow panel, in live mode: all points of the segment go along, the mask does not."""
        params = {"label": label, "foreground": foreground, "background": background, **self.options("infer", model)}
        params |= {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, **more}
        file, result = self.client().infer(model, self.sample["id"], params)
        self.take_in(file, [label])
        return result

    def scribble(self, model: str, label: str, inside: np.ndarray, outside: np.ndarray) -> dict[str, Any]:
        """Update of the scribbles panel: a label map of all segments, strokes last, and their names by position."""
        layers = {**self.segments, "background_scribbles": outside, "foreground_scribbles": inside}
        merged = np.zeros(self.volume.shape, np.int16)
        for value, voxels in enumerate(layers.values(), start=1):
            merged[voxels] = value
        path = self.folder / "scribbles.nii.gz"
        nib.save(nib.Nifti1Image(merged, self.affine), path)
        params = {**self.options("infer", model), "roi": [], "selected_label_name": label}
        params["label_info"] = [{"name": name, "id": value} for value, name in enumerate(layers, start=1)]
        params |= {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
        file, result = self.client().infer(model, self.sample["id"], params, label_in=str(path))
        self.take_in(file, [label])
        return result

    def take_in(self, file: str, names: Any) -> None:
        """Import a mask."""
        labels = [n for n, _ in sorted(names.items(), key=lambda pair: pair[1])] if isinstance(names, dict) else names
        voxels, affine = read(file)
        assert voxels.dtype == np.uint8
        assert voxels.shape == self.volume.shape and np.allclose(affine, self.affine, atol=1e-4)
        for position, name in enumerate(labels, start=1):
            self.segments[name] = voxels == position
        Path(file).unlink()

    def label(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Export: one value per segment, by position; later segments win. Some names are left out, but counted."""
        merged, names, value = np.zeros(self.volume.shape, np.int16), [], 0
        for index, (name, voxels) in enumerate(self.segments.items(), start=1):
            if name in ("background", "foreground_scribbles", "background_scribbles"):
                continue
            value += 1
            merged[voxels] = value
            names.append({"name": name, "idx": index})
        return merged, names

    def submit(self, model: str | None = None) -> dict[str, Any]:
        """Submit Label."""
        self.upload()
        merged, names = self.label()
        path = self.folder / f"label{self.extension}"
        if self.extension == ".nrrd":
            directions = (LPS @ self.affine)[:3]
            header = {"space": "left-posterior-superior", "space directions": directions[:, :3].T}
            nrrd.write(str(path), merged, {**header, "space origin": directions[:, 3], "kinds": ["domain"] * 3})
        else:
            nib.save(nib.Nifti1Image(merged, self.affine), path)
        model = next(iter(self.info["models"])) if model is None else model
        saved = self.client().save_label(self.sample["id"], str(path), params={"label_info": names, "model": model})
        self.connect()
        return saved

    def train(self, model: str, **typed: Any) -> dict[str, Any]:
        """Train."""
        return self.client().train_start(model, self.options("train", model, **typed))

    def watch(self) -> dict[str, Any]:
        """What the timer reads for the progress bars while a round runs."""
        status = self.client().train_status(False)
        if status["status"] == "RUNNING":
            stats: dict[str, Any] = next(iter(self.client().info()["train_stats"].values()), {})
            current = 0 if stats.get("total_time") else stats.get("epoch", 1)
            assert 0 <= max(1, 100 * current / stats.get("total_epochs", 1)) <= 100
            assert isinstance(stats.get("best_metric", 0) * 100, (int, float))
        return status

    def stop(self) -> dict[str, Any] | None:
        """Stop Training, and what the module logs of the answer."""
        status = self.client().train_stop()
        if status:
            assert status.get("result", status["details"][-1]) is not None
        return status


def widget_of(value: Any) -> tuple[str, Any]:
    """What the option table makes of a default, and what it shows at first."""
    if isinstance(value, (list, dict)):
        assert all(isinstance(entry, str) for entry in value), "a combo box fails on anything but texts"
        return "combo", next(iter(value))
    if isinstance(value, bool):
        return "checkbox", value
    return ("number" if isinstance(value, (int, float)) else "text"), str(value) if value else ""


def shown(error: MONAILabelClientException) -> str:
    """The sentence in the window that the module opens on an error."""
    status, _, body = error.msg.partition("; Response: ")
    assert re.fullmatch(r"Status: 4\d\d", status), error.msg
    assert (found := re.fullmatch(r'\{"detail":\s*"(.+)"\}', body, re.DOTALL)), error.msg
    return found[1].encode().decode("unicode_escape") if "\\u" in found[1] else found[1].replace('\\"', '"')


def loop(slicer: Slicer, model: str, draw: Callable[[Slicer], np.ndarray], **training: str) -> str:
    """Next Sample, Run, correct, Submit, Train, Run again: another version, and the next case is another one.

    `draw` gives the values of the correct label on the grid of the open volume.
    """
    case = slicer.next_sample()
    assert case
    first = slicer.run(model, overlap="0.25")
    assert first["model_version"] == 0 and "untrained" in first["warnings"][0]
    truth = draw(slicer)
    for name, value in slicer.info["models"][model]["labels"].items():
        slicer.segments[name] = truth == value
    slicer.segments.pop("spleen")  # a segment that was deleted and drawn again comes last, and changes all numbers
    slicer.segments["spleen"] = truth == slicer.info["models"][model]["labels"]["spleen"]
    done = slicer.info["datastore"]["completed"]
    slicer.submit()
    assert slicer.info["datastore"]["completed"] == done + 1
    slicer.train(model, tracking="None", **training)
    deadline = time.monotonic() + 600
    while (status := slicer.watch())["status"] in ("SUBMITTED", "RUNNING") and time.monotonic() < deadline:
        time.sleep(1)
    assert status["status"] == "DONE", "\n".join(status["details"])
    slicer.connect()
    assert slicer.info["models"][model]["version"] == 1
    again = slicer.run(model, overlap="0.25")
    assert again["model_version"] == 1 and again["warnings"] == []
    assert slicer.next_sample() not in (case, None)
    return case

"""Published model versions: one self-contained checkpoint per version, and a pointer to the one that is served.

    model/<task>/v0001.pt, v0002.pt, …    checkpoints, never rewritten
    model/<task>/v0001.html, …            reports of the rounds that made them (`lib.model.reports.page`)
    model/<task>/v0001.json, …            their manifests with the checkpoint's sha256, so that listing reads no tensors
    model/<task>/served.json              {"version": 2}
    model/<task>/history.jsonl            one line per change of the served version: time, from, to, why

Every file is written beside its place, synced and renamed, so a kill at any instant leaves whole files and a served
model. A checkpoint carries the task, its sentences, the tokenizer and BERT's configuration. A server restarts from it
without the task's files and without a hub.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.files import clear_unfinished, now, numbered, sha256, write_json
from lib.model.checkpoints import (
    CheckpointError,
    DamagedCheckpoint,
    RefusedCheckpoint,
    brief,
    check_same_task,
    checkpoint_of,
    load,
    restore_model,
    save,
    text_assets,
)
from lib.model.refining import restore_refiner
from lib.tasks import Task

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "RefusedCheckpoint",
    "Versions",
    "check_same_task",
    "checkpoint_of",
    "load",
    "restore_model",
    "save",
    "text_assets",
    "write_json",
]

logger = logging.getLogger(__name__)

PUBLISHED, KEPT = "served at publish", "kept"  # a manifest's status
LOCK_SECONDS = 300  # to write the largest checkpoint to a slow disk


class Versions:
    """The versions of one task in one folder. Safe to use from several threads and processes at once.

    Args:
        folder: created when the first version is published.
        keep: how many versions stay; the oldest go first, the served one and its parent never.
    """

    def __init__(self, folder: Path, keep: int = 5) -> None:
        self.folder = folder
        self.keep = keep

    def numbers(self) -> list[int]:
        """Versions there are, oldest first, served or not."""
        return numbered(self.folder, "v", "pt")

    def path(self, version: int) -> Path:
        return self.folder / f"v{version:04d}.pt"

    def report(self, version: int) -> Path:
        """Where the page of a version's round is; not every version has one."""
        return self.path(version).with_suffix(".html")

    @property
    def served(self) -> int | None:
        """The version that is served, None before the first is published."""
        try:
            version = int(json.loads((self.folder / "served.json").read_text())["version"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / 'served.json'}: not readable: {error}") from error
        return version

    @property
    def started(self) -> bool:
        """Whether anything was ever published here, be it damaged or gone since."""
        return bool(self.numbers()) or any((self.folder / f).exists() for f in ("served.json", "history.jsonl"))

    def resolve(self, wanted: Any = None) -> int | None:
        """The version that a request means: a number, 'v3', or 'served', '' or None for the served one.

        Raises:
            RefusedCheckpoint: no such version; the message lists the valid ones.
        """
        if wanted in (None, "", "served"):
            return self.served
        match = re.fullmatch(r"v?0*(\d+)", str(wanted))
        if match and int(match[1]) in self.numbers():
            return int(match[1])
        valid = ", ".join(str(n) for n in self.numbers()) or "none yet"
        raise RefusedCheckpoint(f"model version {wanted!r}: valid are 'served' and {valid}")

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, version: int) -> dict[str, Any]:
        """The checkpoint of a version, if its file is whole.

        Raises:
            DamagedCheckpoint: missing, cut or changed.
        """
        self.verify(version)
        return load(self.path(version))

    def verify(self, version: int) -> None:
        """Compare a version's file with the sha256 in its manifest.

        Raises:
            DamagedCheckpoint: missing, cut or changed.
        """
        path = self.path(version)
        expected = self.manifest(version)["sha256"]
        try:
            found = sha256(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {brief(error)}") from error
        if found != expected:
            raise DamagedCheckpoint(f"{path}: damaged: its sha256 is not that of the published file")

    def candidates(self) -> list[int]:
        """Which version to answer with, the best first: the served one, then what was served before it, then what was
        only kept; newest first. Empty if nothing was ever served."""
        try:
            served = self.served
        except CheckpointError as error:
            logger.error("%s; the newest version that was served is used", error)
            served = None
        others = [m for m in reversed(self.manifests()) if m["version"] != served]
        once = [m["version"] for m in others if m.get("status") == PUBLISHED]
        if served is None:
            return once
        return [served, *once, *(m["version"] for m in others if m["version"] not in once)]

    def read_served(self) -> tuple[int, dict[str, Any]] | None:
        """The served version and its checkpoint; if that is damaged the next best one, and a line in the log says
        so. None if nothing was ever served.

        Raises:
            CheckpointError: there are versions, but none is whole.
        """
        candidates, failures = self.candidates(), []
        for version in candidates:
            try:
                checkpoint = self.read(version)
            except DamagedCheckpoint as error:
                logger.error("%s", error)
                failures.append(str(error))
                continue
            if failures:
                logger.warning("Version %d is used in place of version %d", version, candidates[0])
            return version, checkpoint
        if failures:
            raise CheckpointError(f"no version of {self.folder.name} is whole: {'; '.join(failures)}")
        return None

    def manifest(self, version: int) -> dict[str, Any]:
        """What is known of a version; a missing or damaged manifest file is rebuilt from the checkpoint.

        Raises:
            DamagedCheckpoint: neither can be read.
        """
        sidecar = self._sidecar(version)
        try:
            manifest = json.loads(sidecar.read_text())
            if isinstance(manifest, dict) and isinstance(manifest.get("sha256"), str):
                return manifest
        except (OSError, ValueError):
            pass
        path = self.path(version)
        manifest = {**load(path)["manifest"], "version": version, "sha256": sha256(path)}
        try:
            write_json(sidecar, manifest)
        except OSError as error:  # a read-only folder
            logger.warning("%s: cannot be rebuilt: %s", sidecar, error)
        return manifest

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all versions, oldest first, each with `version`, `served` and the file name of its `report`
        or None; `damaged` says why one cannot be read."""
        try:
            served = self.served
        except CheckpointError:
            served = None
        found = []
        for version in self.numbers():
            try:
                manifest = self.manifest(version)
            except CheckpointError as error:
                manifest = {"damaged": str(error)}
            page = self.report(version)
            report = page.name if page.is_file() else None
            found.append({**manifest, "version": version, "served": version == served, "report": report})
        return found

    def seen(self, version: int | None) -> list[str]:
        """The ids of all cases that a version or any ancestor of it was trained on.

        Raises:
            DamagedCheckpoint: its manifest cannot be read.
        """
        manifest = self.manifest(version) if version is not None else {}
        cases = manifest.get("seen") or manifest.get("trained_on")
        return [str(case) for case in cases] if isinstance(cases, list) else []

    # Writing ------------------------------------------------------------------------------------------------------

    def serve(self, version: int, why: str = "chosen by hand") -> None:
        """Serve another version: back or forward. No checkpoint is rewritten; the change is noted in `history.jsonl`.

        Raises:
            RefusedCheckpoint: no such version.
            DamagedCheckpoint: its file is damaged.
        """
        with self._locked():
            if version not in self.numbers():
                valid = ", ".join(map(str, self.numbers())) or "none yet"
                raise RefusedCheckpoint(f"model version {version}: valid are {valid}")
            self.verify(version)
            self._point_to(version, why)

    def adopt(self, path: Path, task: Task) -> int:
        """Publish and serve a checkpoint file from elsewhere. Returns its number.

        Raises:
            RefusedCheckpoint: damaged, of another task, or its weights do not fit.
        """
        try:
            checkpoint = load(path)
            if not isinstance(checkpoint["manifest"], dict):
                raise CheckpointError(f"{path}: its manifest is not a table of values")
            check_same_task(checkpoint, task, path)
            model, _ = restore_model(checkpoint, path)
            restore_refiner(checkpoint, model, path)
        except CheckpointError as error:
            raise RefusedCheckpoint(str(error)) from error
        manifest = {**checkpoint["manifest"], "origin": "upload", "parent": None}
        return self.publish({**checkpoint, "manifest": manifest}, why="uploaded")

    def publish(self, checkpoint: dict[str, Any], serve: bool = True, why: str = "published") -> int:
        """Write the next version, serve it if wanted, and remove the oldest beyond `keep`. Returns its number.

        Raises:
            RefusedCheckpoint: a manifest that is not plain data.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            clear_unfinished(self.folder, "v*.pt")
            # A number is never given twice, even if somebody has deleted the newest version.
            served = self._served_or_none()
            version = max([*self.numbers(), *numbered(self.folder, "v", "json"), served or 0], default=0) + 1
            manifest = {"parent": served, **checkpoint["manifest"]}
            manifest |= {"version": version, "status": PUBLISHED if serve else KEPT}
            try:
                json.dumps(manifest)
            except (TypeError, ValueError, RecursionError) as error:
                raise RefusedCheckpoint(f"the manifest is not plain data: {brief(error)}") from error
            path = self.path(version)
            save({**checkpoint, "manifest": manifest}, path)
            write_json(self._sidecar(version), {**manifest, "sha256": sha256(path)})
            if serve:
                self._point_to(version, why)
            self._prune(version)
        return version

    def _prune(self, newest: int) -> None:
        protected = {newest, self._served_or_none()}
        protected |= {manifest.get("parent") for manifest in self.manifests() if manifest["served"]}
        for old in self.numbers()[: -self.keep]:
            if old not in protected:
                self.path(old).unlink(missing_ok=True)
                self._sidecar(old).unlink(missing_ok=True)
                self.report(old).unlink(missing_ok=True)

    def _point_to(self, version: int, why: str) -> None:
        line = {"time": now(), "from": self._served_or_none(), "to": version, "why": why}
        write_json(self.folder / "served.json", {"version": version})
        path = self.folder / "history.jsonl"
        try:
            with path.open("a") as history:
                history.write(json.dumps(line) + "\n")
        except OSError as error:  # the version is served all the same
            logger.warning("%s: the change to version %d was not recorded: %s", path, version, error)

    def _served_or_none(self) -> int | None:
        try:
            return self.served
        except CheckpointError:
            return None

    def _sidecar(self, version: int) -> Path:
        return self.path(version).with_suffix(".json")

    def _locked(self) -> FileLock:
        return FileLock(self.folder / ".versions.lock", timeout=LOCK_SECONDS)

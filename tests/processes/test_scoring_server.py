"""Active learning on a real server: scores fill themselves, strategies use them, a kill costs nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from monailabel.client import MONAILabelClient

from lib.activelearning.scoring import cache
from lib.stores.dicom.listing import FRESH_SECONDS
from lib.stores.local import LocalStore
from support.dicom.archive import Archive, needs_orthanc
from support.dicom.series import ACCOUNT, SHAPE, stored
from support.helpers import read_nifti
from support.server import Server

RANKED = ("uncertainty", "alignment", "diverse", "combined")
SCORING = {"score_cases": "200"}


def until(found: Callable[[], Any], seconds: float, server: Server) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s:\n{server.tail(60)}")


def scored(server: Server) -> dict[str, dict]:
    """Image to scores, as the datastore lists them."""
    objects = server.client.datastore()["objects"]
    infos = {image: entry["image"]["info"] for image, entry in objects.items()}
    return {image: info[cache.KEY]["quickstart"] for image, info in infos.items() if cache.KEY in info}


def scoring_processes() -> list[psutil.Process]:
    """Those of this test's servers: they carry its folder in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "scoring" in (process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.slow
def test_scores_fill_themselves_and_decide(tmp_path: Path, phantoms: Callable[..., None]) -> None:
    studies, models = tmp_path / "studies", tmp_path / "models"
    phantoms(studies, cases=6, labelled=2, seed=0)
    with Server(studies, models, SCORING) as server:
        client: MONAILabelClient = server.client
        assert list(client.info()["strategies"]) == ["random", "first", *RANKED]
        # The shipped model is published at the start: it scores six cases while the server answers.
        until(lambda: scored(server), 240, server)
        begun = time.monotonic()
        client.info()
        assert time.monotonic() - begun < 5
        # Killed in its work, it goes on with the next look.
        mine = [p for p in scoring_processes() if str(studies) in p.environ().get("MONAI_LABEL_STUDIES", "")]
        if mine:
            mine[0].send_signal(signal.SIGKILL)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        kept = cache_of(studies)
        assert kept, "what was scored before the kill is on the disk"

    with Server(studies, models, SCORING) as server:
        client = server.client
        assert set(cache_of(studies)) >= set(kept)
        found = until(lambda: len(scored(server)) == 6 and scored(server), 600, server)
        assert {entry["version"] for entry in found.values()} == {1}
        status = until(lambda: server.call("GET", "/scoring/").json(), 30, server)
        assert status["progress"]["done"] == status["progress"]["total"]

        unlabelled = sorted(set(found) - set(labels(studies)))
        for strategy in RANKED:
            picked = client.next_sample(strategy, {})
            assert picked["id"] in unlabelled
            assert (picked["method"], picked["version"], picked["scored"], picked["note"]) == (strategy, 1, 4, "")
            assert cache.KEY not in picked
        by_entropy = max(unlabelled, key=lambda image: found[image]["entropy"])
        picked = client.next_sample("uncertainty", {})
        assert picked["id"] == by_entropy
        assert picked["score"] == pytest.approx(found[by_entropy]["entropy"], abs=1e-6)
        other = MONAILabelClient(server.url, client_id="bob").next_sample("uncertainty", {})
        assert other["id"] != by_entropy, "that one is leased"

        # The map, through the label download that there is.
        _, result = client.infer("quickstart", by_entropy, {"uncertainty_map": True})
        assert result["uncertainty_map"]["tag"] == "uncertainty"
        file = client.download_label(by_entropy, "uncertainty")
        image, heat = read_nifti(studies / f"{by_entropy}.nii.gz"), read_nifti(file)
        assert heat.shape == image.shape and np.array_equal(heat.affine, image.affine)
        values = np.asarray(heat.dataobj)
        assert values.dtype == np.uint8 and 0 < values.max() <= 100
        assert client.info()["datastore"]["completed"] == 2, "a map is not a label"
        upload = {"file": (f"{by_entropy}.nii.gz", (studies / f"{by_entropy}.nii.gz").read_bytes())}
        refused = server.call("POST", "/infer/quickstart", files=upload, data={"params": '{"uncertainty_map": true}'})
        assert refused.status_code == 400 and "uncertainty_map" in refused.json()["detail"]

        # Dice through MONAI Label's endpoint: of the labelled cases, the stored mask against the label.
        labelled = labels(studies)[0]
        client.infer("quickstart", labelled, {"save_label": True})
        answer = server.call("POST", "/scoring/dice", json={})
        assert answer.status_code == 200
        until(lambda: server.call("GET", "/scoring/").json()["status"] == "DONE", 240, server)
        dice = client.datastore()["objects"][labelled]["image"]["info"]["dice_of_classes"]
        assert set(dice) <= set(client.info()["models"]["quickstart"]["labels"]) and 0.5 < max(dice.values()) <= 1
        for method, reason in (("best", "unknown scoring method 'best'; valid are entropy, alignment, dice"),):
            refused = server.call("POST", f"/scoring/{method}", json={})
            assert refused.status_code == 404 and reason in refused.json()["detail"]


@needs_orthanc
@pytest.mark.slow
def test_an_archive_is_scored_too(tmp_path: Path) -> None:
    """With a password. While it is down nothing is noted about its cases; new series are scored, the others stay."""
    models, conf = tmp_path / "models", {"models": "quickstart"}
    with Archive(tmp_path / "orthanc", ACCOUNT) as archive:
        environment = archive.environment(tmp_path / "cache")
        series = [stored(archive, tmp_path, number, labelled=False)[0] for number in range(3)]
        with Server(archive.url, models, conf, **environment) as server:  # scores when asked to
            assert scored(server) == {}

            archive.stop()
            refused = server.call("POST", "/scoring/entropy", json={})
            assert refused.status_code == 502 and "did not answer" in refused.json()["detail"]
            archive.start()
            time.sleep(FRESH_SECONDS)
            assert scored(server) == {}
            picked = server.client.next_sample("uncertainty", {})
            assert picked["method"] == "random" and "scor" in picked["note"]
            assert server.call("POST", "/scoring/entropy", json={}).status_code == 200
            until(lambda: server.call("GET", "/scoring/").json()["status"] == "DONE", 240, server)
            before = scored(server)
            assert set(before) == set(series)
            assert all("failed" not in entry and 0 < entry["entropy"] < 1 for entry in before.values())

        series.append(stored(archive, tmp_path, 3, labelled=False)[0])
        with Server(archive.url, models, {**conf, **SCORING}, **environment) as server:
            after = until(lambda: len(found := scored(server)) == 4 and found, 240, server)
            assert {uid: after[uid] for uid in before} == before
            progress = until(lambda: server.call("GET", "/scoring/").json()["progress"], 30, server)
            assert (progress["done"], progress["total"]) == (1, 1), "the others were scored before the restart"
            by_entropy = max(series, key=lambda uid: after[uid]["entropy"])
            picked = server.client.next_sample("uncertainty", {})
            assert (picked["id"], picked["method"], picked["note"]) == (by_entropy, "uncertainty", "")
            assert picked["StudyInstanceUID"] and cache.KEY not in picked
            for strategy in RANKED[1:]:
                picked = server.client.next_sample(strategy, {})
                assert picked["id"] in series and picked["method"] == strategy

            # The map of a series: beside it on the server, and no label of the archive.
            instances = archive.instances()
            _, result = server.client.infer("quickstart", by_entropy, {"uncertainty_map": True})
            heat = read_nifti(server.client.download_label(by_entropy, result["uncertainty_map"]["tag"]))
            assert heat.shape == SHAPE and 0 < np.asarray(heat.dataobj).max() <= 100
            assert archive.instances() == instances and server.client.info()["datastore"]["completed"] == 0


def cache_of(studies: Path) -> dict[str, Any]:
    """What the studies folder itself says, without a server."""
    store = LocalStore(studies)
    infos = {image: store.get_image_info(image) for image in store.list_images()}
    return {image: info for image, info in infos.items() if cache.scores_of(info, "quickstart") is not None}


def labels(studies: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in (studies / "labels" / "final").glob("*.nii.gz"))

"""Requests to a model: how far they are, and an end to those that nobody waits for any more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from lib.infers import BiPVLInfer
from lib.tasks import load_task
from support.scoring import publish
from support.server import Server


@pytest.mark.parametrize("model", ["quickstart", "quickstart_clicks", "doubts"])
def test_a_request_says_how_far_it_is_and_ends_with_whoever_asked(
    model: str, tmp_path: Path, phantoms: Callable[..., None]
) -> None:
    phantoms(tmp_path / "studies", cases=1, labelled=0)
    # Many windows, each of them slow enough to be seen.
    conf = {"models": "quickstart", "overlap": "0.8", "model.vision": "unet", "model.feature_size": "8"}
    conf |= {"spacing": "[2, 2, 2]", "patch": "[32, 32, 32]", "model.scratch": "{layers: 4, width: 16, heads: 2}"}
    path = f"/infer/{model}"
    if model == "doubts":  # of a published version
        path = "/doubts/quickstart"
        task = load_task("quickstart", {key: value for key, value in conf.items() if key != "models"})
        publish(BiPVLInfer(task, tmp_path / "models" / "quickstart"), task, seed=0)
    with Server(tmp_path / "studies", tmp_path / "models", conf) as server:
        (image,) = server.call("GET", "/datastore/?output=all").json()["objects"]

        def progress(client_id: str = "ann") -> Any:
            query = {"image": image, "client_id": client_id}
            return server.call("GET", f"{path}/progress", params=query).json()

        assert progress() is None
        params = json.dumps({"client_id": "ann", **({} if model == "quickstart" else {"label": "liver"})})
        with ThreadPoolExecutor(1) as pool:
            query, data = {"image": image, "client_id": "ann"}, {"params": params}
            ask = requests.get if model == "doubts" else requests.post
            asked = pool.submit(ask, f"{server.url}{path}", params=query, data=data, timeout=(9, 6))
            seen = []
            while not asked.done():
                seen.append(progress())
                time.sleep(0.2)
            with pytest.raises(requests.Timeout):
                asked.result()
        done = [found["done"] for found in seen if found]
        assert done == sorted(done) and 0 < done[-1] < seen[-1]["total"]
        deadline = time.monotonic() + 60
        while progress() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert progress() is None and progress("ben") is None
        assert f"{path.split('/')[2]} of '{image}': cancelled after" in server.tail()

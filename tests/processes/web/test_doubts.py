"""Where a model doubts, on a real server with accounts and the model that comes with the app."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
import numpy as np
import pytest

from support.helpers import read_nifti
from support.server import Server

LPS = np.diag([-1, -1, 1, 1])


@pytest.mark.slow
def test_places_come_with_the_mask_and_answers_are_kept(tmp_path: Path, phantoms: Callable[..., None]) -> None:
    studies = tmp_path / "studies"
    phantoms(studies, cases=2, labelled=0)
    word = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
    users = tmp_path / "users"
    users.write_text(f"vera:{word}:viewer\nann:{word}:annotator\nben:{word}:annotator\nada:{word}:admin\n")
    users.chmod(0o600)
    with Server(studies, tmp_path / "models", {"models": "quickstart", "users": str(users)}) as server:

        def ask(method: str, image: str, who: str = "ann", status: int = 200, **more: Any) -> Any:
            path = f"/doubts/quickstart?image={image}{more.pop('more', '')}"
            answer = server.call(method, path, elsewhere=True, auth=(who, "word"), **more)
            assert answer.status_code == status, answer.text
            return answer.json()

        one, other = sorted(path.name.split(".")[0] for path in studies.glob("*.nii.gz"))
        nothing: dict[str, Any] = {"version": None, "time": None, "places": []}
        assert ask("GET", one, more="&look=false") == nothing

        # A mask leaves them behind.
        params = {"params": json.dumps({"client_id": "ann"})}
        path = f"/infer/quickstart?image={one}&output=json"
        result = server.call("POST", path, elsewhere=True, auth=("ann", "word"), data=params).json()
        kept = ask("GET", one, more="&look=false")
        assert kept == result["doubts"] == ask("GET", one), "nothing is computed again"
        places = kept["places"]
        assert kept["version"] == 1 and 1 <= len(places) <= 10
        doubt = [place["volume"] * place["entropy"] for place in places]
        assert doubt == sorted(doubt, reverse=True)
        image = read_nifti(studies / f"{one}.nii.gz")
        for place in places:
            ends = zip(place["voxel"], place["box"], image.shape, strict=True)
            assert all(0 <= low <= n <= high < size for n, (low, high), size in ends)
            centre = LPS @ image.affine @ [*place["voxel"], 1]
            np.testing.assert_allclose(centre[:3], place["centre"], atol=0.01)
            assert place["answers"] == [] and place["label"] in result["voxels"]

        # And a look does, where nobody has asked for a mask; a viewer may look, and not answer.
        assert ask("GET", other, "vera")["places"]
        first, second = places[0]["id"], places[1]["id"]
        said: dict[str, Any] = {"json": {"place": first, "answer": "right", "version": 1}}
        assert "needs the role annotator" in ask("PUT", one, "vera", 403, **said)["detail"]
        ask("PUT", one, "ann", **said)
        found = ask("PUT", one, "ben", json={"place": second, "answer": "fix"})
        assert [[(a["answer"], a["who"], a["version"]) for a in place["answers"]] for place in found["places"][:3]] == [
            [("right", "ann", 1)],
            [("fix", "ben", 1)],
            [],
        ]
        assert "valid are right, fix" in ask("PUT", one, status=400, json={"place": first, "answer": "no"})["detail"]
        assert "by now" in ask("PUT", one, status=409, json={"place": first, "answer": "fix", "version": 9})["detail"]
        assert ask("GET", one) == found

    # After a crash and a new start they are there; with the image they go.
    with Server(studies, tmp_path / "models", {"models": "quickstart", "users": str(users)}) as server:
        assert ask("GET", one, more="&look=false") == found
        gone = server.call("DELETE", f"/datastore/image?id={one}", elsewhere=True, auth=("ada", "word"))
        assert gone.status_code == 200, gone.text
        assert len(list((tmp_path / "models" / "quickstart" / "reviews").glob("*.json"))) == 1

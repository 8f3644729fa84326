"""The route of the check of labels, on a real server with the model that comes with the app."""

import bcrypt
import nibabel as nib
import numpy as np
import pytest

from lib.tasks import load_task
from support.helpers import read_nifti
from support.server import Server


@pytest.mark.slow
def test_a_server_finds_the_mask_that_was_shifted(tmp_path, phantoms):
    """The model that comes with the app, and a liver 24 mm too far to the front in one of three labels."""
    studies = tmp_path / "studies"
    phantoms(studies, cases=4, labelled=3, seed=0)
    final = studies / "labels" / "final"
    names = sorted(path.name.split(".")[0] for path in final.glob("*.nii.gz"))
    file, task = final / f"{names[1]}.nii.gz", load_task("quickstart")
    label = read_nifti(file)
    values, liver = np.asarray(label.dataobj).copy(), task.label_values["liver"]
    mask = values == liver
    values[mask] = 0
    values[np.roll(mask, round(24 / label.header.get_zooms()[1]), 1)] = liver
    nib.save(nib.Nifti1Image(values, label.affine, label.header), file)
    word = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
    users = tmp_path / "users"
    users.write_text(f"vera:{word}:viewer\n")
    users.chmod(0o600)
    with Server(studies, tmp_path / "models", {"users": str(users)}) as server:

        def ask(images, model="quickstart", **more):
            return server.call("GET", f"/agreement/{model}", params={"image": images}, **more)

        found = ask(names, elsewhere=True, auth=("vera", "word")).json()
        assert (found["version"], found["problems"]) == (1, {})
        assert (found["masks"][0]["image"], found["masks"][0]["class"]) == (names[1], "liver")
        assert len(found["masks"]) == 3 * len(task.classes)
        assert ask(names, elsewhere=True).status_code == 401
        assert ask(names, "nothing").status_code == 404
        assert ask(["nobody"]).status_code == 404
        unlabelled = next(i for i in server.client.datastore()["objects"] if i not in names)
        assert "no final label" in ask([unlabelled]).json()["detail"]
        assert ask(names * 7).status_code == 400
        assert ask([]).status_code == 422
        mask, result = server.client.infer("quickstart", names[0], {})
        assert set(result["fit"]) == set(task.classes)
        assert all(0 < value <= 1 for value in result["fit"].values() if value is not None)

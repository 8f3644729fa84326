"""Two annotators on a real server are never offered the same case, and what they were promised outlives a kill."""

from __future__ import annotations

import numpy as np
import pytest
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from support.helpers import write_nifti
from support.server import Server


def test_a_server_with_two_annotators(tmp_path):
    """Each gets another case; a save frees it; leases, labels and history outlive a kill -9."""
    studies, models = tmp_path / "studies", tmp_path / "models"
    studies.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_nifti(studies / f"{name}.nii.gz", rng.normal(size=(12, 12, 12)).astype(np.float32))
    label = write_nifti(tmp_path / "label.nii.gz", np.ones((12, 12, 12), np.uint8))
    wrong = write_nifti(tmp_path / "wrong.nii.gz", np.ones((9, 12, 12), np.uint8))

    def clients(server: Server) -> list[MONAILabelClient]:
        return [MONAILabelClient(f"http://127.0.0.1:{server.port}", client_id=name) for name in ("ann", "bob", "cem")]

    with Server(studies, models, {}) as server:
        ann, bob, cem = clients(server)
        assert ann.next_sample("first", {})["id"] == "a"
        assert bob.next_sample("first", {})["id"] == "b"
        assert cem.next_sample("first", {}) == {}
        assert ann.next_sample("first", {})["id"] == "a", "her own case stays hers"
        with pytest.raises(MONAILabelClientException) as error:
            ann.next_sample("best", {})
        assert error.value.status_code == 404
        assert "valid are random, first" in error.value.msg

        ann.save_label("a", str(label), "final", {})
        ann.save_label("a", str(label), "final", {"annotated": ["liver"]})
        assert ann.next_sample("first", {}) == {}, "a is labelled, b is bob's"
        with pytest.raises(MONAILabelClientException) as error:
            bob.save_label("b", str(wrong), "final", {})
        assert "Status: 400" in error.value.msg
        assert "not on the grid of its image" in error.value.msg
        assert len(list((studies / "labels" / "rejected" / "b").glob("*.nii.gz"))) == 1
        server.process.kill()
        server.process.wait()

    with Server(studies, models, {}, MONAI_LABEL_DATASTORE_READ_ONLY="true") as server:
        ann, bob, cem = clients(server)
        assert cem.next_sample("first", {}) == {}, "b is still bob's"
        assert bob.next_sample("first", {})["id"] == "b"
        status = server.client.info()["datastore"]
        assert (status["total"], status["completed"]) == (2, 1)
        assert server.client.datastore()["objects"]["a"]["labels"]["final"]["info"]["annotated"] == ["liver"]
        with pytest.raises(MONAILabelClientException) as error:
            bob.save_label("b", str(label), "final", {})
        assert "Status: 403" in error.value.msg
        assert not (studies / "labels" / "final" / "b.nii.gz").exists()
    assert len(list((studies / "labels" / "history" / "final" / "a").glob("*.nii.gz"))) == 1

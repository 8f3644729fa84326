"""Eight annotators at once: no error, no lost label, and how long they wait."""

import pytest

from support.clients import load
from support.server import Server, add_case
from support.training import SMALL

CLIENTS = 8
SECONDS = 120


@pytest.mark.slow
def test_eight_clients_for_two_minutes(tmp_path, phantoms, capsys):
    studies = tmp_path / "studies"
    phantoms(tmp_path, cases=3, labelled=0)
    for number in range(12):
        add_case(studies, tmp_path / f"phantom_{number % 3:03}.nii.gz", f"case_{number:02}")
    images = {p.name.removesuffix(".nii.gz"): p for p in studies.glob("*.nii.gz")}
    with Server(studies, tmp_path / "models", {"models": "quickstart", **SMALL}) as server:
        result = load.run(server.client.get_server_url(), "quickstart", images, tmp_path, CLIENTS, SECONDS)
        status = server.client.info()["datastore"]
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {SECONDS} s\n{result.table()}")
    assert result.errors == []
    assert all(result.seconds[name] for name in load.OPERATIONS)
    for case, digests in result.saved.items():
        kept = [studies / "labels" / "final" / f"{case}.nii.gz"]
        kept += (studies / "labels" / "history" / "final" / case).glob("*.nii.gz")
        assert digests <= {load.digest(p) for p in kept}, f"a label of {case} is lost"
    assert status["completed"] == len(result.saved)

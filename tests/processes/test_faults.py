"""Faults tried on real processes and files. After each: no label lost, a whole model served, a clear message.

The table at the end of the run lists what was tried and what was seen.
"""

import concurrent.futures
import hashlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from lib.model import versions
from lib.model.versions import Versions
from lib.stores.local import LocalStore
from support import FAULTS
from support.clients.load import digest
from support.helpers import read_nifti
from support.rounds import Rounds
from support.server import Server
from support.training import SMALL

pytestmark = pytest.mark.slow  # five servers and forty rounds

KILLS = 20
ROUND = {"device": "cpu", "tracking": "None", "val_split": 0, "max_epochs": 2, "learning_rate": 1e-3}
CONF = {"models": "quickstart", **SMALL}


@pytest.fixture
def table(request):
    """(fault, what was seen), printed at the end of the run."""
    return request.config.stash[FAULTS]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    with Rounds("quickstart", SMALL, tmp_path_factory.mktemp("rounds") / "rounds.log") as forked:
        yield forked


@pytest.fixture
def studies(tmp_path, phantoms):
    folder = tmp_path / "studies"
    phantoms(folder, cases=3, labelled=2)
    return folder


@pytest.fixture
def mount(tmp_path):
    """Mount something below tmp_path; skipped if this user may not."""
    mounted = []

    def do(*arguments: str, target: Path) -> Path:
        target.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting needs privileges: {done.stderr.strip()}")
        mounted.append(target)
        return target

    yield do
    for target in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(target)], check=True)


def labels(studies: Path) -> dict[str, str]:
    """Every label file of a folder, also earlier and refused ones, with its SHA-256."""
    return {str(p.relative_to(studies)): digest(p) for p in (studies / "labels").rglob("*.nii.gz")}


def whole(models: Path) -> int:
    """The served version, which must load completely."""
    store = Versions(models / "quickstart")
    served = store.served
    assert served is not None
    versions.restore_model(versions.load(store.path(served)))
    return served


def drawing(studies: Path, case: str, folder: Path, seed: int) -> Path:
    """A new mask for a case."""
    source = read_nifti(studies / f"{case}.nii.gz")
    mask = np.random.default_rng(seed).integers(0, 3, source.shape, dtype=np.uint8)
    path = folder / f"{case}-{seed}.nii.gz"
    nib.save(nib.Nifti1Image(mask, source.affine), path)
    return path


def writing(folder: Path, prefix: str, process: int) -> bool:
    """Wait until a process of this machine writes a file that starts so; False if it ended before."""
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        if folder.is_dir() and any(name.startswith(prefix) for name in os.listdir(folder)):
            return True
    return False


# Training ---------------------------------------------------------------------------------------------------------


def test_kill_of_the_trainer_at_twenty_moments(rounds, studies, tmp_path, table):
    models, folder = tmp_path / "models", tmp_path / "models" / "quickstart"
    start = time.monotonic()
    rounds.start(studies, models, **ROUND)
    assert rounds.wait() == 0, rounds.log.read_text()
    seconds = time.monotonic() - start
    before, moments, published = labels(studies), random.Random(0), 0
    # Random moments, and moments within a write, which random ones would hardly meet.
    writes = [(folder / "train", ".last.pt."), (folder, ".v0"), (folder, ".served.json.")] * 3
    for kill in range(KILLS):
        process = rounds.start(studies, models, **ROUND)
        if kill < len(writes):
            writing(*writes[kill], process)
        else:
            time.sleep(moments.uniform(0, seconds))
        published += not rounds.kill()
        assert whole(models) >= 1
        assert labels(studies) == before
    rounds.start(studies, models, **ROUND, resume=True)
    assert rounds.wait() == 0, rounds.log.read_text()
    served = whole(models)
    assert served > 1
    leftovers = [p.name for p in folder.rglob(".*.pt.*")]
    assert leftovers == [], "the next round clears what killed ones left"
    table.append((f"kill -9 of the trainer, {KILLS} moments", f"whole model after each; the next round is v{served}"))


@pytest.mark.parametrize("moment", ["checkpoint", "publish"])
def test_full_disk_while_training(rounds, studies, tmp_path, mount, table, moment):
    models = mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", target=tmp_path / "models")
    folder = models / "quickstart"
    rounds.start(studies, models, **ROUND)
    assert rounds.wait() == 0, rounds.log.read_text()
    size = Versions(folder).path(1).stat().st_size
    before, first = labels(studies), digest(Versions(folder).path(1))
    process = rounds.start(studies, models, **ROUND)
    if moment == "publish":  # the round's own checkpoint is written first, then nothing more fits
        writing(folder / "train", "last.pt", process)
    free = shutil.disk_usage(models).free
    (models / "ballast").write_bytes(bytes(free - size // 2))
    text_before = len(rounds.log.read_text())
    assert rounds.wait() != 0
    assert "No space left on device" in rounds.log.read_text()[text_before:]
    assert whole(models) == 1
    assert digest(Versions(folder).path(1)) == first
    assert labels(studies) == before
    (models / "ballast").unlink()
    rounds.start(studies, models, **ROUND)
    assert rounds.wait() == 0, "with room again, rounds go on"
    table.append((f"full disk during {moment}", "round ends with 'No space left on device'; v1 unchanged and served"))


# A server -----------------------------------------------------------------------------------------------------------


class Shared(Server):
    """A server that tests share."""

    folder: Path  # of its studies and models


@pytest.fixture(scope="module")
def running(tmp_path_factory, rounds, phantoms):
    """A server with one published version, shared by the tests that leave it whole."""
    folder = tmp_path_factory.mktemp("server")
    phantoms(folder / "studies", cases=3, labelled=2)
    rounds.start(folder / "studies", folder / "models", **ROUND)
    assert rounds.wait() == 0, rounds.log.read_text()
    server = Shared(folder / "studies", folder / "models", CONF)
    server.folder = folder
    with server:
        yield server


def refused(call, *words: str, status: str = "4") -> str:
    with pytest.raises(MONAILabelClientException) as error:
        call()
    assert f"Status: {status}" in error.value.msg or "Status: 507" in error.value.msg, error.value.msg
    for word in words:
        assert word in error.value.msg
    return error.value.msg


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty file", "other grid"])
def test_damaged_label_upload(running, tmp_path, table, damage):
    studies, client = running.folder / "studies", running.client
    good = drawing(studies, "phantom_000", tmp_path, 1)
    client.save_label("phantom_000", str(good), "final", {})
    bad = tmp_path / "bad.nii.gz"
    if damage == "truncated":
        bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif damage == "no image":
        bad.write_bytes(b"drawn by hand")
    elif damage == "empty file":
        bad.write_bytes(b"")
    else:
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), bad)
    before = labels(studies)
    message = refused(lambda: client.save_label("phantom_000", str(bad), "final", {}), "phantom_000")
    after = labels(studies)
    assert digest(studies / "labels" / "final" / "phantom_000.nii.gz") == digest(good)
    assert before.items() <= after.items()
    assert digest(bad) in after.values(), "what was sent is kept aside"
    table.append((f"label upload: {damage}", message.split("Response: ")[-1][:90]))


def test_eight_clients_save_one_case(running, tmp_path, table):
    studies = running.folder / "studies"
    drawn = [drawing(studies, "phantom_001", tmp_path, 100 + n) for n in range(8)]

    def save(path: Path) -> None:
        client = MONAILabelClient(running.client.get_server_url(), tmpdir=str(tmp_path), client_id=path.name)
        client.save_label("phantom_001", str(path), "final", {})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(save, drawn))
    kept = labels(studies)
    assert {digest(p) for p in drawn} <= set(kept.values())
    assert kept["labels/final/phantom_001.nii.gz"] in {digest(p) for p in drawn}
    assert running.client.info()["datastore"]["completed"] == 2
    table.append(("8 clients save one case at once", "8 labels kept: one current, the others in its history"))


def test_two_trainings_at_once(running, rounds, table):
    studies, models = running.folder / "studies", running.folder / "models"
    running.client.train_start("quickstart", {**ROUND, "max_epochs": 2000})
    try:
        with pytest.raises(MONAILabelClientException, match="429"):
            running.client.train_start("quickstart", ROUND)
        lock = models / "quickstart" / "train" / "round.lock"
        while not lock.exists():
            time.sleep(0.2)
        while "Epoch 1/" not in "\n".join(running.client.train_status().get("details", [])):
            time.sleep(0.2)
        text_before = len(rounds.log.read_text())
        rounds.start(studies, models, **ROUND)
        assert rounds.wait() != 0
        assert "already running" in rounds.log.read_text()[text_before:]
    finally:
        running.client.train_stop()
    assert whole(models) == 1
    table.append(
        ("two trainings at once, on the server and beside it", "429 from the server; the other is refused by name")
    )


def test_removed_model_folder(running, table):
    """Runs late in this module: it takes the shared server's models away and brings them back."""
    models = running.folder / "models"
    mask, result = running.client.infer("quickstart", "phantom_002", {})
    expected = np.asarray(read_nifti(mask).dataobj)
    models.rename(models.with_name("gone"))
    try:
        mask, result = running.client.infer("quickstart", "phantom_002", {})
        assert np.array_equal(np.asarray(read_nifti(mask).dataobj), expected), "the model in memory goes on"
        assert result["model_version"] == 1
        assert result["warnings"] != []
        warning = result["warnings"][0]
    finally:
        shutil.rmtree(models, ignore_errors=True)
        models.with_name("gone").rename(models)
    _, result = running.client.infer("quickstart", "phantom_002", {})
    assert result["warnings"] == []
    table.append(("model folder removed while serving", warning[:90]))


def test_kill_of_the_server_while_labels_are_saved(tmp_path, studies, table):
    """Each label that was acknowledged is there, whole, after the kill and after the next start."""
    acknowledged: set[str] = set()
    moments = random.Random(1)
    for attempt in range(2):
        with Server(studies, tmp_path / "models", CONF) as server:
            url = server.client.get_server_url()
            stop = threading.Event()

            def annotate(number: int, url: str = url, stop: threading.Event = stop, attempt: int = attempt) -> None:
                client = MONAILabelClient(url, tmpdir=str(tmp_path), client_id=f"a{number}")
                for count in range(10_000):
                    path = drawing(studies, "phantom_002", tmp_path, 100_000 * attempt + 20_000 * number + count)
                    try:
                        client.save_label("phantom_002", str(path), "final", {})
                    except (MONAILabelClientException, OSError):
                        return
                    except Exception:  # noqa: BLE001  http.client's own, when the server dies within an answer
                        return
                    acknowledged.add(digest(path))
                    if stop.is_set():
                        return

            threads = [threading.Thread(target=annotate, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(2 + moments.uniform(0, 1))
            os.kill(server.process.pid, signal.SIGKILL)
            stop.set()
            for thread in threads:
                thread.join()
        kept = labels(studies)
        assert acknowledged <= set(kept.values())
        current = studies / "labels" / "final" / "phantom_002.nii.gz"
        assert np.asarray(read_nifti(current).dataobj).shape == read_nifti(studies / "phantom_002.nii.gz").shape
        store = LocalStore(str(studies))
        assert store.status()["completed"] == 3
    table.append(
        ("kill -9 of the server during saves, twice", f"all {len(acknowledged)} acknowledged labels kept, whole")
    )


def test_full_disk_while_a_label_is_saved(tmp_path, phantoms, mount, table):
    studies = mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", target=tmp_path / "studies")
    phantoms(studies, cases=2, labelled=1)
    with Server(studies, tmp_path / "models", CONF) as server:
        before = labels(studies)
        label = drawing(studies, "phantom_000", tmp_path, 5)
        (studies / "ballast").write_bytes(bytes(shutil.disk_usage(studies).free - label.stat().st_size // 2))
        message = refused(lambda: server.client.save_label("phantom_000", str(label), "final", {}), "507")
        assert labels(studies) == before
        (studies / "ballast").unlink()
        server.client.save_label("phantom_000", str(label), "final", {})
        assert digest(studies / "labels" / "final" / "phantom_000.nii.gz") == digest(label)
        assert set(before.values()) <= set(labels(studies).values())
    table.append(("full disk during a label save", message.split("Response: ")[-1][:90]))


def test_read_only_studies_and_a_damaged_checkpoint(tmp_path, studies, rounds, mount, table):
    """One server for both: its studies can only be read, and its newest checkpoint is cut."""
    models = tmp_path / "models"
    for _ in range(2):
        rounds.start(studies, models, **ROUND)
        assert rounds.wait() == 0, rounds.log.read_text()
    newest = Versions(models / "quickstart").path(2)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    locked = mount("--bind", str(studies), target=tmp_path / "locked")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(locked)], check=True)
    with Server(locked, models, CONF) as server:
        before = labels(studies)
        assert server.client.next_sample("first", {})["id"] == "phantom_002"
        label = drawing(studies, "phantom_002", tmp_path, 6)
        message = refused(lambda: server.client.save_label("phantom_002", str(label), "final", {}), "read")
        assert labels(studies) == before
        table.append(("read-only studies", message.split("Response: ")[-1][:90]))

        _, result = server.client.infer("quickstart", "phantom_002", {})
        assert result["model_version"] == 1
        cut = {"model_version": "2"}
        told = "a model file on the server cannot be used"
        refused(lambda: server.client.infer("quickstart", "phantom_002", cut), told, status="500")
        assert "v0002.pt" in server.log.read_text()
        table.append(("served checkpoint cut in half", result["warnings"][0][:90]))


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_clock_jump(tmp_path, studies, table):
    """Saved with a clock a year ahead, then with the right one: both labels stay and no case is locked."""
    first, second = (drawing(studies, "phantom_002", tmp_path, seed) for seed in (7, 8))
    for shift, label in (("+1y", first), (None, second)):
        with Server(studies, tmp_path / "models", CONF, faketime=shift) as server:
            other = MONAILabelClient(server.client.get_server_url(), tmpdir=str(tmp_path), client_id=f"other {shift}")
            if label is first:
                assert other.next_sample("first", {})["id"] == "phantom_002"
            else:
                (studies / "labels" / "final" / "phantom_002.nii.gz").rename(tmp_path / "aside.nii.gz")
                assert server.client.next_sample("first", {})["id"] == "phantom_002", "last year's lease is over"
                (tmp_path / "aside.nii.gz").rename(studies / "labels" / "final" / "phantom_002.nii.gz")
            server.client.save_label("phantom_002", str(label), "final", {})
    kept = labels(studies)
    assert kept["labels/final/phantom_002.nii.gz"] == digest(second)
    assert digest(first) in kept.values()
    table.append(("clock jumps back by a year", "both labels kept, the newer one current; no lease left over"))


def test_digest_notices_a_change(tmp_path):
    """What the other tests rely on."""
    path = tmp_path / "a"
    path.write_bytes(b"x")
    assert digest(path) == hashlib.sha256(b"x").hexdigest()

"""docs/running/deployment.md: its files, with other ports and folders, used by the programs they are for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bcrypt
import numpy as np
import pytest
import requests
from monailabel.client.client import MONAILabelClientException

from support import ROOT
from support.clients.slicer import Slicer, loop, read, shown
from support.dicom.archive import PROGRAM, Archive, free_port, needs_orthanc
from support.dicom.dicoms import with_uids
from support.helpers import read_nifti
from support.server import Server
from support.training import SMALL

DEPLOY = ROOT / "docs" / "running" / "deploy"
NAME = "label.hospital.example"
ARCHIVE_USER = ("bipvl", "archive's word")
ACCOUNT = ("MONAI_LABEL_DICOMWEB_USERNAME", "MONAI_LABEL_DICOMWEB_PASSWORD")
FOLDERS = ("MONAI_LABEL_DICOMWEB_CACHE_PATH", "MONAI_LABEL_SESSION_PATH")
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
OPENSSL = shutil.which("openssl")
needs_nginx = pytest.mark.skipif(
    not (NGINX and OPENSSL), reason="nginx or openssl is not installed (Debian, Ubuntu: apt-get install nginx openssl)"
)


def archive_env(archive: Archive) -> dict[str, str]:
    """What archive.env holds."""
    assert archive.account
    return dict(zip(ACCOUNT, archive.account, strict=True))


def unit_command() -> list[str]:
    """What the systemd unit runs, without the program."""
    text = (DEPLOY / "bipvl-label.service").read_text()
    found = re.search(r"^ExecStart=(.*?[^\\])$", text, re.MULTILINE | re.DOTALL)
    assert found
    program, *words = shlex.split(found[1].replace("\\\n", " "))
    assert program == "/opt/bipvl-label/.venv/bin/monailabel"
    return words


class Deployed(Archive):
    """Orthanc with docs/running/deploy/orthanc.json."""

    def start(self) -> None:
        settings = (DEPLOY / "orthanc.json").read_text()
        settings = settings.replace("/var/lib/orthanc/bipvl", str(self.folder / "db"))
        settings = settings.replace("8042", self.rest.rpartition(":")[2])
        (self.folder / "orthanc.json").write_text(settings)
        assert PROGRAM
        with (self.folder / "log").open("w") as log:
            command = [PROGRAM, str(self.folder / "orthanc.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=archive_env(self))
        _wait_for(lambda: requests.get(f"{self.url}/studies", timeout=5).status_code == 401)


class UnitServer(Server):
    """The server with the options of docs/running/deploy/bipvl-label.service."""

    def __init__(self, home: Path, archive: Archive, users: Path) -> None:
        folders = {name: str(home / name.split("_")[2].lower()) for name in FOLDERS}
        super().__init__(home, home / "models", {}, **folders, **archive_env(archive))
        places = {
            "/opt/bipvl-label/": f"{ROOT}/",
            "/var/lib/bipvl/": f"{home}/",
            "/etc/bipvl/users.txt": str(users),
            "http://127.0.0.1:8042/dicom-web": archive.url,
        }
        words = unit_command()
        for old, new in places.items():
            assert any(old in word for word in words), old
            words = [word.replace(old, new) for word in words]
        words[words.index("--port") + 1] = str(self.port)
        small = {"model.text": "scratch", **SMALL}  # a network for two CPU cores
        self.command = [*self.command[: self.command.index("start_server")], *words]
        self.command += [word for key, value in small.items() for word in ("--conf", key, value)]


@contextmanager
def nginx(folder: Path, server_port: int) -> Iterator[int]:
    """nginx with docs/running/deploy/nginx.conf and a certificate of its own (`tls/label.pem`) in front of the server.

    Yields the port of HTTPS. Plain HTTP is on the port below it.
    """
    assert NGINX and OPENSSL
    (folder / "tls").mkdir(parents=True)
    key, certificate = folder / "tls" / "label.key", folder / "tls" / "label.pem"
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={NAME} -addext subjectAltName=DNS:{NAME}"
    command = [OPENSSL, *request.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    port = _pair_of_ports()
    site = (DEPLOY / "nginx.conf").read_text()
    for old, new in (
        ("listen 80;", f"listen 127.0.0.1:{port - 1};"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8000", f"127.0.0.1:{server_port}"),
        ("/etc/bipvl/tls", str(folder / "tls")),
    ):
        assert old in site
        site = site.replace(old, new)
    site = re.sub(r"listen \[::\].*\n", "", site)
    places = "".join(f"{w}_temp_path {folder}/{w};" for w in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    logs = f"pid {folder}/pid; error_log {folder}/error; events {{}}"
    (folder / "nginx.conf").write_text(f"{logs} http {{ access_log {folder}/access; {places} {site} }}")
    subprocess.run([NGINX, "-t", "-c", str(folder / "nginx.conf")], check=True, capture_output=True)
    process = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"])
    try:
        _wait_for(lambda: requests.get(f"http://127.0.0.1:{port - 1}", allow_redirects=False, timeout=5).is_redirect)
        yield port
    finally:
        process.terminate()
        process.wait(20)


@needs_orthanc
@needs_nginx
@pytest.mark.slow
def test_the_whole_loop_as_deployed(real_data, tmp_path, monkeypatch):
    """Slicer over TLS, accounts, an archive with a password; then backups, taken while all of it runs, are restored."""
    resolve = socket.getaddrinfo
    here = {NAME: "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: resolve(here.get(host, host), *more, **kw))
    dicoms, home, users = real_data / "dicom_ct", tmp_path / "home", tmp_path / "users.txt"
    with_uids(dicoms / "ts-example-dicom-j2k", tmp_path / "j2k")
    users.write_text(f"ada:{bcrypt.hashpw(b'a long word', bcrypt.gensalt(4)).decode()}\n")
    users.chmod(0o600)
    home.mkdir()
    with Deployed(tmp_path / "orthanc", ARCHIVE_USER) as archive:
        archive.store(dicoms / "crlm-ct-1004", tmp_path / "j2k")
        unit = UnitServer(home, archive, users)
        unit.plain = True
        with unit as server, nginx(tmp_path / "nginx", server.port) as port:
            url, certificate = f"https://{NAME}:{port}", tmp_path / "nginx" / "tls" / "label.pem"
            _pages(url, port, certificate)
            with pytest.raises(MONAILabelClientException) as error:
                Slicer(url, tmp_path / "stranger")
            assert error.value.status_code == 401
            slicer = Slicer(url, tmp_path / "slicer", login=("ada", "a long word"))
            monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
            with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
                slicer.next_sample()
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            case = loop(slicer, "amos22-ct", _boxes, max_epochs="2", val_split="0")
            assert slicer.sample["PatientID"], "the name that the volume gets in the scene"
            (kept,) = archive.segs()
            assert {s.SegmentLabel for s in kept.SegmentSequence} == {"spleen", "liver", "aorta"}
            assert kept.ReferencedSeriesSequence[0].SeriesInstanceUID == case
            label, _ = read(slicer.client().download_label(case, "final"))
            assert np.bincount(label.ravel())[[1, 6, 8]].tolist() == [6 * 40 * 40, 6 * 60 * 60, 6 * 10 * 10]
            mask, result = slicer.client().infer("amos22-ct", case, {"overlap": 0.0})
            assert result["model_version"] == 1
            before = np.asarray(read_nifti(mask).dataobj)
            # As the page says: while the server runs, the archive after it was stopped.
            shutil.copytree(home, tmp_path / "backup" / "home")
            archive.stop()
            shutil.copytree(tmp_path / "orthanc" / "db", tmp_path / "backup" / "db")
            slicer.segments["liver"][10:20, 10:20, 2:4] = True
            drawn, _ = slicer.label()
            with pytest.raises(
                MONAILabelClientException, match="The drawing is kept as labels/history/final/"
            ) as error:
                slicer.submit()
            (lost,) = (home / "dicomweb").glob(f"*/{error.value.msg.partition('kept as ')[2].strip(chr(34) + '}')}")
            assert np.array_equal(np.asarray(read_nifti(lost).dataobj), drawn)
            slicer.open_own(slicer.folder / "cache" / f"{case}.nii.gz", "Volume")
            with pytest.raises(MONAILabelClientException) as error:
                slicer.run("amos22-ct")
            assert shown(error.value) == "images come from the archive: store the DICOM series there"

    shutil.copytree(tmp_path / "backup" / "db", tmp_path / "orthanc2" / "db")
    restored = Deployed(tmp_path / "orthanc2", ARCHIVE_USER)
    restored.start()
    try:
        shutil.copytree(tmp_path / "backup" / "home" / "models", tmp_path / "home2" / "models")
        with UnitServer(tmp_path / "home2", restored, users) as server:
            client = Slicer(server.url, tmp_path / "again", login=("ada", "a long word")).client()
            assert client.info()["datastore"]["completed"] == 1
            assert np.array_equal(read(client.download_label(case, "final"))[0], label)
            mask, result = client.infer("amos22-ct", case, {"overlap": 0.0})
            assert result["model_version"] == 1
            assert np.array_equal(np.asarray(read_nifti(mask).dataobj), before)
    finally:
        restored.stop()


def test_the_units_are_valid(tmp_path):
    """As systemd reads them; the program is there under another name."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = (DEPLOY / "bipvl-label.service").read_text()
    (tmp_path / "bipvl-label.service").write_text(unit.replace("/opt/bipvl-label/.venv/bin/monailabel", sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "bipvl-label.service")], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    settings = json.loads((DEPLOY / "orthanc.json").read_text())
    assert settings["AuthenticationEnabled"] is True and settings["RemoteAccessAllowed"] is False
    dropin = (DEPLOY / "orthanc-bipvl.conf").read_text()
    assert "EnvironmentFile=/etc/bipvl/archive.env" in dropin and "EnvironmentFile=/etc/bipvl/archive.env" in unit


def test_the_page_names_every_file_and_its_commands_can_be_read():
    text = (ROOT / "docs" / "running" / "deployment.md").read_text()
    for file in DEPLOY.iterdir():
        assert f"docs/running/deploy/{file.name}" in text
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        subprocess.run(["bash", "-n"], input=block.replace("<version>", "v"), text=True, check=True)


def _pages(url: str, port: int, certificate: Path) -> None:
    """The health check, the redirection, OHIF and its way to the archive."""
    plain = requests.get(f"http://{NAME}:{port - 1}/ohif/", allow_redirects=False, timeout=20)
    assert (plain.status_code, plain.headers["Location"]) == (301, f"https://{NAME}/ohif/")
    assert requests.get(f"{url}/auth/", verify=str(certificate), timeout=20).json()["enabled"] is True
    assert requests.get(f"{url}/ohif/", verify=str(certificate), timeout=20).status_code == 401
    login: dict[str, Any] = {"auth": ("ada", "a long word"), "verify": str(certificate), "timeout": 60}
    page = requests.get(f"{url}/ohif/", **login)
    assert page.status_code == 200 and "OHIF" in page.text
    assert page.headers["Strict-Transport-Security"].startswith("max-age=")
    assert len(requests.get(f"{url}/proxy/dicom/studies", **login).json()) == 2
    old = ssl.create_default_context(cafile=str(certificate))
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname=NAME)


def _boxes(slicer: Slicer) -> np.ndarray:
    """A spleen, a liver and an aorta that are boxes."""
    values = slicer.info["models"]["amos22-ct"]["labels"]
    truth = np.zeros(slicer.volume.shape, np.uint8)
    for name, start, size in (("spleen", 40, 40), ("liver", 120, 60), ("aorta", 200, 10)):
        truth[start : start + size, start : start + size, 5:11] = values[name]
    return truth


def _pair_of_ports() -> int:
    """A free port whose neighbour below is free too."""
    while True:
        port = free_port()
        with socket.socket() as other:
            try:
                other.bind(("127.0.0.1", port - 1))
                return port
            except OSError:
                continue


def _wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError(f"did not happen in {seconds} s")

"""Attacks on a real server: files outside its folders, other people's pages, strangers, and passwords in its log."""

import base64
import json
import pickle
import socket
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT
from support.clients.attack import PASSWORDS, Evil, bomb, raw, tar_with, users_file, zip_with
from support.server import ELSEWHERE, Server
from support.training import SMALL

TOKEN = "a-token-nobody-guesses"
LISTED = "https://viewer.example.org"


@pytest.fixture(scope="module")
def studies(tmp_path_factory, phantoms):
    folder = tmp_path_factory.mktemp("security") / "studies"
    phantoms(folder, cases=2, labelled=1)
    return folder


@pytest.fixture(scope="module")
def server(studies):
    """With accounts, a fixed token, one page of another origin that may use it, and small uploads."""
    folder = studies.parent
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    conf = {
        **SMALL,
        "users": str(users_file(folder)),
        "token": str(token),
        "cors_origins": LISTED,
        "max_upload_mb": "2",
    }
    (folder / "tmp").mkdir()
    places = {"MONAI_LABEL_SESSION_PATH": str(folder / "sessions"), "TMPDIR": str(folder / "tmp")}
    with Server(studies, folder / "models", conf, BIPVL_USER="root", BIPVL_PASSWORD="word-of-root", **places) as server:
        yield server
    assert not list((folder / "tmp").glob("bipvl-server-*")), "the temporary folder goes with the server"


@pytest.fixture(scope="module")
def closed(tmp_path_factory, studies):
    """Without accounts."""
    with Server(studies, tmp_path_factory.mktemp("closed") / "models", SMALL) as server:
        yield server


def everything_below(*folders):
    return {(p, p.stat().st_mtime_ns) for folder in folders for p in folder.rglob("*") if p.is_file()}


# Files ----------------------------------------------------------------------------------------------------------------

ESCAPES = ["../../evil", "..", "../evil", "/tmp/evil", "a/../../evil", "..\\evil", ".hidden", "a\x00b"]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_id_or_tag_leads_out_of_the_studies(server, studies, name):
    """`PUT /datastore/image?image=../../…` overwrote the app's main.py, `tag=../..` wrote anywhere."""
    image = (studies / "phantom_000.nii.gz").read_bytes()
    code = everything_below(ROOT / "apps")
    answers = [
        server.call("PUT", "/datastore/image", params={"image": name}, files={"file": ("main.py", b"print()")}),
        server.call("PUT", "/datastore/", params={"image": name}, files={"file": ("x.nii.gz", image)}),
        server.call(
            "PUT",
            "/datastore/label",
            params={"image": "phantom_000", "tag": name},
            files={"label": ("x.nii.gz", image)},
        ),
        server.call("PUT", "/datastore/label", params={"image": name}, files={"label": ("x.nii.gz", image)}),
        server.call("GET", "/datastore/image", params={"image": name}),
        server.call("GET", "/datastore/label", params={"label": "phantom_000", "tag": name}),
        server.call("GET", "/datastore/label", params={"label": name, "tag": "final"}),
        server.call("DELETE", "/datastore/image", params={"id": name}),
        server.call("DELETE", "/datastore/label", params={"id": name, "tag": "final"}),
        server.call("DELETE", "/datastore/label", params={"id": "phantom_000", "tag": name}),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["detail"]
    written = [p for p in studies.parent.rglob("*") if "evil" in p.name and studies not in p.parents]
    assert not written and not Path("/tmp/evil").exists()
    assert {p for p, _ in everything_below(ROOT / "apps")} == {p for p, _ in code}


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "OTHER", "/proc/self/environ"])
def test_inference_reads_no_file_of_the_server(server, studies, tmp_path, path):
    """`/infer?image=/abs/path` and `params.image` read any file."""
    if path == "OTHER":
        path = str(studies / "phantom_000.nii.gz")  # its id would be right, its path is not
    assert server.call("POST", "/infer/quickstart", params={"image": path}).status_code == 404
    for key in ("image", "image_path", "label", "session", "path", "model"):
        answer = server.call(
            "POST", "/infer/quickstart", params={"image": "phantom_000"}, data={"params": json.dumps({key: path})}
        )
        assert answer.status_code == 400, answer.text
        assert key in answer.json()["detail"]
    answer = server.call("POST", "/infer/quickstart", params={"session_id": path})
    assert answer.status_code == 404
    answer = server.call(
        "POST",
        "/infer/quickstart",
        params={"image": "phantom_000"},
        data={"params": json.dumps({"result_extension": "/../../x.py"})},
    )
    assert answer.status_code == 400 and ".nii.gz" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar_with("../evil"), "would be written elsewhere"),
        (tar_with("a/../../evil"), "would be written elsewhere"),
        (tar_with("/tmp/evil"), "would be written elsewhere"),
        (tar_with("link", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (tar_with("link", tarfile.LNKTYPE, "/etc/passwd"), "is a link or a device"),
        (tar_with("pipe", tarfile.FIFOTYPE), "is a link or a device"),
        (tar_with("disk", tarfile.BLKTYPE), "is a link or a device"),
        (zip_with("../evil"), "would be written elsewhere"),
        (zip_with("..\\evil"), "would be written elsewhere"),
        (zip_with("C:/evil"), "would be written elsewhere"),
        (zip_with("link", 0o120777), "is a link or a device"),
        (bomb(), "more than 8 MB when unpacked"),
        (b"no archive", "neither a zip nor a tar"),
    ],
    ids=lambda v: v if isinstance(v, str) else "archive",  # bytes of an archive hold the time
)
def test_archives_cannot_leave_their_session(server, studies, content, reason):
    before = everything_below(studies.parent / "sessions") if (studies.parent / "sessions").exists() else set()
    answer = server.call("PUT", "/session/", params={"uncompress": "true"}, files={"files": ("a.tar.gz", content)})
    assert answer.status_code == 400
    assert reason in answer.json()["detail"]
    assert not list(studies.parent.rglob("evil")) and not Path("/tmp/evil").exists()
    assert everything_below(studies.parent / "sessions") == before


def test_upload_names_cannot_leave_their_session(server):
    files = [("files", (name, b"some bytes")) for name in ("../../evil.nii.gz", "..", "/tmp/evil")]
    answer = server.call("PUT", "/session/", files=files)
    assert answer.status_code == 200
    session = answer.json()
    received = [p for p in Path(session["session_info"]["image"]).rglob("*")]
    assert len(received) == 3
    assert server.call("DELETE", f"/session/{session['session_id']}").status_code == 200
    assert not Path(session["session_info"]["path"]).exists()


def test_an_uploaded_checkpoint_runs_no_code(server, tmp_path):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    for content in ((tmp_path / "evil.pt").read_bytes(), pickle.dumps(Evil()), b""):
        answer = server.call("PUT", "/model/quickstart", files={"file": ("evil.pt", content)})
        assert answer.status_code == 400, answer.text
    assert not Path("/tmp/evil").exists()
    assert server.call("GET", "/model/quickstart/versions").json() == []
    answer = server.call("DELETE", "/model/quickstart")
    assert answer.status_code == 405 and "serve another version" in answer.json()["detail"]


@pytest.mark.parametrize(
    "params",
    [{"name": "../../evil"}, {"tracking_uri": "sqlite:////tmp/evil.db"}, {"model": "other"}, {"gpus": "0; touch x"}],
)
def test_training_writes_nowhere_else(server, params):
    answer = server.call("POST", "/train/quickstart", json=params)
    assert answer.status_code == 400, answer.text
    assert next(iter(params)) in answer.json()["detail"]
    assert server.call("GET", "/train/").status_code == 404, "nothing was started"


def test_what_nothing_needs_is_gone(server):
    for method, path in [("POST", "/reload"), ("POST", "/infer/wsi/quickstart"), ("GET", "/static/ohif/index.html")]:
        assert server.call(method, path).status_code in (404, 405)


# Strangers ------------------------------------------------------------------------------------------------------------

PATHS = ["/", "/info/", "/docs", "/openapi.json", "/ohif/", "/datastore/", "/logs/", "/proxy/dicom/studies", "/train/"]


def test_without_accounts_only_this_machine_is_let_in(closed):
    for path in [*PATHS, "/auth/", "/nothing"]:
        answer = closed.call("GET", path, elsewhere=True)
        assert answer.status_code == 403
        for way in (ELSEWHERE, "--conf users FILE", "BIPVL_USER", "--conf insecure true"):
            assert way in answer.json()["detail"]
    assert closed.call("GET", "/info/").status_code == 200
    assert closed.client.auth_enabled() is False


@pytest.mark.parametrize(
    "header",
    [{"X-Real-IP": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"}, {"Via": "1.1 proxy"}, {"X-Forwarded-For": ""}],
)
def test_a_proxy_on_this_machine_is_not_this_machine(closed, header):
    assert closed.call("GET", "/info/", headers=header).status_code == 403


def test_accounts_are_asked_for_from_elsewhere(server):
    for path in [*PATHS, "/nothing"]:
        answer = server.call("GET", path, elsewhere=True)
        assert answer.status_code == 401
        assert answer.raw.headers.getlist("www-authenticate") == [
            'Basic realm="BiPVL Label", charset="UTF-8"',
            "Bearer",
        ]
    for name, password in [*PASSWORDS.items(), ("root", "word-of-root"), ("anybody", TOKEN)]:
        assert server.call("GET", "/info/", elsewhere=True, auth=(name, password)).status_code == 200
    assert server.call("GET", "/info/", elsewhere=True, headers={"Authorization": f"Bearer {TOKEN}"}).ok
    forged = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJyb2IiLCJleHAiOjk5OTk5OTk5OTl9."
    answer = server.call("GET", "/info/", elsewhere=True, headers={"Authorization": f"Bearer {forged}"})
    assert answer.status_code == 401


def test_roles(server, studies):
    """Viewers read and infer, annotators label and train, admins delete and change models."""
    label = {"label": ("x.nii.gz", (studies / "labels" / "final" / "phantom_000.nii.gz").read_bytes())}
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        ("viewer", "GET", "/datastore/?output=all", {}),
        ("viewer", "POST", "/infer/quickstart", {}),
        ("viewer", "GET", "/model/quickstart/versions", {}),
        ("annotator", "PUT", "/datastore/label?image=phantom_000&tag=second", {"files": label}),
        ("annotator", "PUT", "/session/", {}),
        ("annotator", "POST", "/activelearning/first", {"json": {}}),
        ("annotator", "POST", "/train/nothing", {"json": {}}),
        ("annotator", "DELETE", "/train/", {}),
        ("admin", "DELETE", "/datastore/label?id=phantom_000&tag=second", {}),
        ("admin", "DELETE", "/datastore/image?id=nothing", {}),
        ("admin", "PUT", "/model/quickstart", {}),
        ("admin", "POST", "/model/quickstart/versions/1/serve", {}),
        ("admin", "GET", "/logs/", {}),
        ("admin", "PATCH", "/anything", {}),
    ]
    ranks = {"vera": "viewer", "ada": "annotator", "rob": "admin"}
    order = ["viewer", "annotator", "admin"]
    for needed, method, path, more in cases:
        for name, role in ranks.items():
            answer = server.call(method, path, elsewhere=True, auth=(name, PASSWORDS[name]), **more)
            refused = answer.status_code == 403
            assert refused == (order.index(role) < order.index(needed)), f"{name} {method} {path}: {answer.text}"
            assert not refused or f"needs the role {needed}" in answer.json()["detail"]
    answer = server.call(
        "POST",
        "/infer/quickstart?image=phantom_000",
        elsewhere=True,
        auth=("vera", PASSWORDS["vera"]),
        data={"params": '{"save_label": true}'},
    )
    assert answer.status_code == 403, "keeping a mask is labelling"


def test_who_saved_a_label_is_kept(server, studies):
    label = {"label": ("x.nii.gz", (studies / "labels" / "final" / "phantom_000.nii.gz").read_bytes())}
    forged = {"params": '{"user": "somebody else"}'}
    place = "/datastore/label?image=phantom_000&tag=third"
    assert server.call("PUT", place, elsewhere=True, auth=("ada", PASSWORDS["ada"]), files=label, data=forged).ok
    assert server.call("GET", "/datastore/label/info?label=phantom_000&tag=third").json()["user"] == "ada"


def test_wrong_passwords_are_slowed_down_by_address(server):
    guesser = {"X-Forwarded-For": "198.51.100.9"}
    answers = [server.call("GET", "/info/", headers=guesser, auth=("rob", f"guess {i}")) for i in range(7)]
    assert [a.status_code for a in answers] == [401] * 5 + [429] * 2
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert server.call("GET", "/info/", headers=guesser, auth=("rob", PASSWORDS["rob"])).status_code == 429
    assert server.call("GET", "/info/", headers={"X-Forwarded-For": "198.51.100.8"}, auth=("rob", PASSWORDS["rob"])).ok


def test_a_changed_account_counts_at_once(server, studies):
    file = studies.parent / "users"
    before = file.read_text()
    token = server.client.auth_token("ada", PASSWORDS["ada"])["access_token"]
    bearer = {"Authorization": f"Bearer {token}"}
    assert server.call("GET", "/info/", elsewhere=True, headers=bearer).ok
    try:
        file.write_text("".join(line + "\n" for line in before.splitlines() if not line.startswith("ada")))
        assert server.call("GET", "/info/", elsewhere=True, headers=bearer).status_code == 401
        assert server.call("GET", "/info/", elsewhere=True, auth=("ada", PASSWORDS["ada"])).status_code == 401
        file.write_text("broken")
        assert server.call("GET", "/info/", elsewhere=True, auth=("vera", PASSWORDS["vera"])).ok, "the last good one"
    finally:
        file.write_text(before)
    assert server.call("GET", "/info/", elsewhere=True, headers=bearer).ok


# Other people's pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://viewer.example.org.evil.example", "file://"]
)
def test_pages_of_other_sites_are_refused(server, origin):
    """Stock reflected every origin, with credentials. Refused on this machine too: a browser may run here."""
    for method, path in [
        ("GET", "/info/"),
        ("POST", "/train/quickstart"),
        ("DELETE", "/datastore/image?id=phantom_000"),
    ]:
        answer = server.call(method, path, headers={"Origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
    assert server.call("OPTIONS", "/datastore/label", headers=preflight).status_code == 403


def test_a_listed_page_is_let_in(server):
    preflight = {"Origin": LISTED, "Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x"}
    answer = server.call("OPTIONS", "/datastore/label", elsewhere=True, headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == LISTED
    answer = server.call("GET", "/info/", elsewhere=True, headers={"Origin": LISTED}, auth=("ada", PASSWORDS["ada"]))
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert server.call("GET", "/info/", elsewhere=True, headers={"Origin": LISTED}).status_code == 401
    assert server.call("GET", "/info/", headers={"Origin": server.url}).ok, "its own page"


def test_cross_site_requests_without_origin(server):
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.call("GET", "/datastore/image?image=phantom_000", headers=image).status_code == 403
    assert server.call("GET", "/ohif/", headers=image).status_code == 403
    assert server.call("GET", "/ohif/", headers=link).ok
    assert server.call("GET", "/info/", headers=link).status_code == 403
    assert server.call("GET", "/info/", headers={"Sec-Fetch-Site": "same-origin"}).ok


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST.", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1@evil.example", 400),
        ("[:::1::]", 421),
        ("", 400),
    ],
)
def test_names_that_are_not_this_machines_are_refused(server, host, status):
    """DNS rebinding: a page points its own name at this server."""
    assert f" {status} " in raw(server, f"GET /info/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")


def test_bodies_are_limited_and_leave_nothing(server, studies):
    head = "PUT /datastore/image?image=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: {}\r\n"
    multipart = head.format("multipart/form-data; boundary=b")
    assert " 413 " in raw(server, f"{multipart}Content-Length: {3 << 20}\r\n\r\n")
    assert " 413 " in raw(server, f"{head.format('application/json')}Content-Length: {2 << 20}\r\n\r\n")
    piece = "x" * 65536
    start = '--b\r\nContent-Disposition: form-data; name="file"; filename="x.nii"\r\n\r\n'
    chunks = "".join(f"{len(c):x}\r\n{c}\r\n" for c in [start, *[piece] * 40])
    assert " 413 " in raw(server, f"{multipart}Transfer-Encoding: chunked\r\n\r\n{chunks}")
    answer = server.call("POST", "/activelearning/first", json={"x": "y" * (2 << 20)})
    assert answer.status_code == 413
    (private,) = (studies.parent / "tmp").glob("bipvl-server-*")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [p.name for p in private.iterdir()] == ["lock"], "what was received in part is gone"


def test_answers_carry_headers_for_browsers(server):
    for answer in (server.call("GET", "/"), server.call("GET", "/info/", elsewhere=True), server.call("GET", "/none")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["referrer-policy"]


def test_nothing_secret_is_logged(server):
    """Runs last: after every login above."""
    params = {"password": "typed-by-mistake", "concepts": {"authorization": "Bearer typed-by-mistake"}}
    server.call("POST", "/infer/quickstart?image=phantom_000", data={"params": json.dumps(params)})
    server.call("POST", "/activelearning/first", json=params)
    log = server.log.read_text()
    basic = [base64.b64encode(f"{n}:{p}".encode()).decode() for n, p in PASSWORDS.items()]
    for secret in [*PASSWORDS.values(), *basic, TOKEN, "word-of-root", "typed-by-mistake", "$2b$"]:
        assert secret not in log
    assert "Failed login of 'rob' from 198.51.100.9" in log

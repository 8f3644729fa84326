"""The concept page and its routes on a real server: who may do what, bad input, the history, rounds, and Chromium."""

import base64
import gzip
import json
import threading

import bcrypt
import nibabel as nib
import numpy as np
import pytest

from lib.app.web.access.guard import role_needed
from lib.tasks import load_task
from support.helpers import read_nifti
from support.server import Server
from support.training import SMALL

TASK = load_task("quickstart")
WAYS = {"liver": {"shape": [" Narrow, like a sickle. ", "A bow, and a slender one."]}}
SHAPE = {"liver": {"shape": "A narrow crescent, thin on both sides."}}


@pytest.fixture(scope="module")
def studies(tmp_path_factory, phantoms):
    folder = tmp_path_factory.mktemp("concepts") / "studies"
    phantoms(folder, cases=2, labelled=1)
    return folder


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    file = tmp_path_factory.mktemp("accounts") / "users"
    word = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
    file.write_text(f"vera:{word}:viewer\nada:{word}\nrob:{word}:admin\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def server(studies, users):
    with Server(studies, studies.parent / "models", {**SMALL, "users": str(users)}) as server:
        yield server


def state(server):
    return server.call("GET", "/concepts/quickstart").json()


def send(server, path, user=None, **body):
    """As a program on this machine, or as somebody elsewhere with an account."""
    more = {"elsewhere": True, "auth": (user, "word")} if user else {}
    return server.call("POST", f"/concepts/quickstart/{path}", json=body, **more)


def save(server, sentences, user=None, **body):
    return send(server, "revisions", user, sentences=sentences, **{"base": state(server)["revision"], **body})


def masks(found):
    """The two masks of an answer, as arrays of label places."""
    shape = found["volumes"]["shape"]
    raw = [gzip.decompress(base64.b64decode(found["volumes"][name])) for name in ("before", "after")]
    return [np.frombuffer(part, np.uint8).reshape(shape) for part in raw]


# Saving ---------------------------------------------------------------------------------------------------------------


def test_edit_save_sign_edit_and_restore(server):
    before = state(server)
    first = before["revision"]
    assert before["history"][-1]["number"] == 0 and before["served"] is None
    words = {"liver": {"shape": "  One narrow crescent. "}}
    answer = save(server, words, "ada", variants=WAYS, note="it is narrow here")
    assert answer.json() == {"revision": first + 1, "warnings": []}, answer.text
    now = state(server)
    assert now["classes"]["liver"]["shape"] == "One narrow crescent."
    ways = {"shape": ["Narrow, like a sickle.", "A bow, and a slender one."]}
    assert now["classes"]["spleen"] == before["classes"]["spleen"]
    assert now["variants"] == {**before["variants"], "liver": {**before["variants"]["liver"], **ways}}
    assert not now["file_changed"]
    entry = now["history"][0]
    assert (entry["who"], entry["note"], entry["base"]) == ("ada", "it is narrow here", first)
    assert now["review"]["status"] == "unreviewed"

    assert send(server, "review", "ada", by="Dr. N. N.", base=first + 1).json() == {"revision": first + 2}
    signed = state(server)
    assert (signed["review"]["status"], signed["review"]["by"]) == ("reviewed", "Dr. N. N.")
    assert signed["hash"] == now["hash"] and signed["history"][0]["who"] == "ada"
    assert save(server, {"liver": {"shape": "One wide crescent."}}, "rob").ok
    assert state(server)["review"]["status"] == "unreviewed", "what was signed is not signed in other words"

    answer = send(server, f"revisions/{first + 2}/restore", "ada", base=first + 3)
    assert answer.json() == {"revision": first + 4}
    restored = state(server)
    assert restored["hash"] == signed["hash"] and restored["review"] == signed["review"]
    assert restored["history"][0]["note"] == f"revision {first + 2} again"
    old = server.call("GET", f"/concepts/quickstart/revisions/{first + 3}").json()
    assert old["classes"]["liver"]["shape"] == "One wide crescent.", "nothing was lost"
    assert old["variants"] == now["variants"], "nobody touched them"
    assert save(server, {}, "ada", variants={"liver": {"shape": []}}).ok
    reworded = state(server)
    assert "shape" not in reworded["variants"]["liver"] and reworded["hash"] == signed["hash"]
    assert reworded["review"]["status"] == "unreviewed", "nobody has signed other wordings"
    assert send(server, "revisions/0/restore", base=first + 5).ok
    assert state(server)["hash"] == TASK.concepts.hash


def test_the_check_tells_advice_from_what_cannot_be_used(server):
    base = state(server)["revision"]
    sentences = {"liver": {"shape": "A normal wedge."}, "spleen": {"texture": "wide " * 90}}
    variants = {"aorta": {"shape": ["A tube.", "A normal tube."]}}
    found = send(server, "check", "vera", sentences=sentences, variants=variants, base=base).json()["problems"]
    assert {(p["class"], p["attribute"], p["fatal"]) for p in found} >= {
        ("liver", "shape", False),
        ("spleen", "texture", True),
        ("aorta", "shape wording 2", False),
    }
    assert save(server, {"liver": {"shape": "A normal wedge."}}).ok, "advice is advice"
    assert any("diagnostic word 'normal'" in p["message"] for p in state(server)["problems"])


BAD = {
    "unknown class": ({"heart": {"shape": "A cone."}}, "unknown class 'heart'; valid are liver"),
    "unknown attribute": ({"liver": {"size": "Large."}}, "unknown attribute 'size'; valid are class, shape"),
    "empty": ({"liver": {"shape": "  "}}, "liver.shape: expected a sentence"),
    "markup": ({"liver": {"shape": "A <img src=x onerror=alert(1)> wedge."}}, "sentences are plain text; found '<'"),
    "line break": ({"liver": {"shape": "A\nwedge."}}, "sentences are plain text; found the character U+000A"),
    "turned text": ({"liver": {"shape": "A \u202e wedge."}}, "the character U+202E"),
    "over-long": ({"liver": {"shape": "a" * 401}}, "401 characters; a sentence has at most 400"),
    "too many tokens": ({"liver": {"shape": "0." * 190}}, "tokens; the limit is 256"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_and_changes_nothing(server, kind):
    sentences, reason = BAD[kind]
    before = state(server)
    answer = save(server, sentences)
    assert answer.status_code == 400 and reason in answer.json()["detail"], answer.text
    if kind not in ("over-long", "too many tokens"):
        answer = send(server, "try", sentences=sentences, base=before["revision"], image="phantom_000")
        assert answer.status_code == 400 and reason in answer.json()["detail"], answer.text
    params = {"params": json.dumps({"concepts": sentences})}
    if kind != "over-long":
        answer = server.call("POST", "/infer/quickstart?image=phantom_000&output=json", data=params)
        assert answer.status_code == 400, "a request's own words too"
    assert state(server) == before


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("revisions", {"sentences": [1]}, 422, "sentences"),
        ("revisions", {"sentences": {"liver": {"shape": 5}}}, 422, "sentences"),
        ("revisions", {"variants": {"liver": {"shape": "One way."}}}, 422, "variants"),
        (
            "revisions",
            {"variants": {"liver": {"shape": ["One way."]}}},
            400,
            "shape: one wording; at least 2 are needed",
        ),
        ("check", {"variants": {"heart": WAYS["liver"]}}, 400, "unknown class 'heart'; valid are liver"),
        ("revisions", {"sentences": SHAPE, "base": 999}, 404, "no revision 999; valid are 0"),
        ("revisions", {"sentences": SHAPE, "base": -1}, 422, "base"),
        ("revisions", {"sentences": SHAPE, "note": "x" * 201}, 400, "note: one line"),
        ("revisions", {}, 400, "nothing to save"),
        ("revisions/999/restore", {"base": 0}, 404, "no revision 999"),
        ("revisions/-1/restore", {"base": 0}, 404, ""),
        ("review", {"by": " ", "base": 0}, 400, "by: expected the name"),
        ("review", {"by": "<b>Dr.</b>", "base": 0}, 400, "by: expected the name"),
        ("try", {"image": "nobody"}, 404, "unknown image 'nobody'"),
        ("try", {"image": "../../etc/passwd"}, 404, "unknown image"),
        ("map", {"image": "nobody"}, 404, "unknown image 'nobody'"),
    ],
)
def test_requests_that_cannot_be_used(server, path, body, status, reason):
    before = state(server)
    base = before["revision"] if "base" not in body and path == "revisions" else None
    answer = send(server, path, **({"base": base} if base is not None else {}), **body)
    assert answer.status_code == status and reason in answer.json()["detail"], answer.text
    assert state(server) == before
    assert server.call("GET", "/concepts/unet").status_code == 404
    assert server.call("GET", "/concepts/page/..%2f..%2fconcept_routes.py").status_code == 404


def test_of_two_who_edit_the_same_text_the_second_is_told(server):
    base = state(server)["revision"]
    assert save(server, {"liver": {"contour": "Quite smooth."}}, "ada", base=base).ok
    answer = save(server, {"liver": {"contour": "Rather rough."}}, "rob", base=base)
    assert answer.status_code == 409 and f"revision {base + 1} was saved in the meantime" in answer.json()["detail"]
    assert state(server)["classes"]["liver"]["contour"] == "Quite smooth."


def test_who_may_do_what(server):
    base = state(server)["revision"]
    for path, body in (
        ("revisions", {"sentences": SHAPE}),
        ("review", {"by": "Vera"}),
        ("revisions/0/restore", {}),
    ):
        answer = send(server, path, "vera", base=base, **body)
        assert answer.status_code == 403 and "needs the role annotator" in answer.json()["detail"]
        assert server.call("POST", f"/concepts/quickstart/{path}", elsewhere=True, json=body).status_code == 401
        headers = {"Origin": "https://evil.example"}
        answer = server.call("POST", f"/concepts/quickstart/{path}", headers=headers, json={"base": base, **body})
        assert answer.status_code == 403, "a page of another site"
    assert state(server)["revision"] == base
    seen = server.call("GET", "/concepts/quickstart", elsewhere=True, auth=("vera", "word")).json()
    assert seen["may_save"] is False and state(server)["may_save"] is True
    assert server.call("GET", "/concepts/", elsewhere=True).status_code == 401
    assert role_needed("POST", "/concepts/x/something-new") == "admin"
    assert role_needed("DELETE", "/concepts/x/revisions/1") == "admin"


# Trying ---------------------------------------------------------------------------------------------------------------


def test_a_try_compares_two_masks_and_leaves_the_served_text_alone(server, studies):
    place = "/infer/quickstart?image=phantom_001&output=json"
    plain = server.call("POST", place).json()["voxels"]
    sentences = {name: dict.fromkeys(("shape", "location"), f"Number {n}.") for n, name in enumerate(TASK.classes)}
    answer = send(server, "try", "vera", sentences=sentences, image="phantom_001")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    before, after = masks(found)
    assert before.shape == tuple(np.array(nib.as_closest_canonical(read_nifti(studies / "phantom_001.nii.gz")).shape))
    assert found["changed"] == (before != after).sum() > 0
    for number, label in enumerate(found["labels"], 1):
        a, b = before == number, after == number
        assert (label["before"], label["after"]) == (a.sum(), b.sum())
        assert label["changed"] == (a != b).sum()
        assert label["dice"] == (pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum())) if (a | b).any() else None)
        assert plain[label["name"]] == label["before"]
    assert found["before"]["concept_weights"] != found["after"]["concept_weights"]
    assert "untrained" in found["before"]["warnings"][0]
    assert server.call("POST", place).json()["voxels"] == plain
    same = send(server, "try", image="phantom_001").json()
    assert same["changed"] == 0 and np.array_equal(*masks(same))


def test_the_map_before_and_after_training(server):
    found = send(server, "map", "vera", image="phantom_000").json()
    assert np.array(found["before"]["points"]).shape == (6, 6, 2)
    assert found["after"] == {"missing": "no version is published yet"}


def test_a_try_keeps_nobody_waiting(server):
    finished = []
    trying = threading.Thread(target=lambda: finished.append(send(server, "try", image="phantom_001").status_code))
    trying.start()
    assert server.call("GET", "/info/").ok and finished == []
    trying.join()
    assert finished == [200]


# What a round reads ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a round
def test_a_round_reads_the_newest_revision_and_its_version_goes_on_reading_it(server):
    """The last test of this server: afterwards a version is published."""

    def result():
        return server.call("POST", "/infer/quickstart?image=phantom_001&output=json").json()

    assert save(server, {"aorta": {"shape": "A wide winding tube, round on each slice."}}).ok
    trained_with = state(server)
    assert trained_with["hash"] != TASK.concepts.hash
    assert server.train("quickstart", 400, max_epochs=1)["status"] == "DONE", server.tail()
    (version,) = server.call("GET", "/model/quickstart/versions").json()
    assert version["concepts"] == trained_with["hash"]
    before = result()
    assert before["model_version"] == 1 and before["warnings"] == []

    assert save(server, {"aorta": {"shape": "A thin straight tube, oval on each slice."}}).ok
    now = state(server)
    assert now["served"]["hash"] == trained_with["hash"] != now["hash"]
    assert now["served"]["revisions"] == [trained_with["revision"]]
    after = result()
    assert after["voxels"] == before["voxels"], "masks change with the next round, not with a click"
    assert after["concept_weights"] == before["concept_weights"]
    assert "the next round reads newer ones" in after["warnings"][0]
    found = send(server, "map", image="phantom_000", base=now["revision"]).json()
    assert np.array(found["after"]["points"]).shape == (6, 6, 2) and found["version"] == 1

"""Whatever is sent to the routes of the OpenAPI description, the server never answers 5xx."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from support.server import Server
from support.training import SMALL

pytestmark = pytest.mark.slow  # over a thousand requests

KNOWN = {"image": "phantom_000", "label": "phantom_000", "tag": "final", "model": "quickstart", "strategy": "first"}
LONG = ("/train/", "/batch/")  # starting these is minutes of work, and the subject of other tests


@pytest.fixture(scope="module")
def server(tmp_path_factory, phantoms):
    folder = tmp_path_factory.mktemp("schema")
    phantoms(folder / "studies", cases=1, labelled=1)
    with Server(folder / "studies", folder / "models", SMALL) as server:
        yield server


@pytest.mark.parametrize(
    ("mode", "names"),
    [(GenerationMode.POSITIVE, {}), (GenerationMode.POSITIVE, KNOWN), (GenerationMode.NEGATIVE, {})],
    ids=["valid types", "names that exist", "invalid types"],
)
def test_no_request_makes_the_server_fail(server, mode, names):
    description: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in description.get_all_operations()]
    assert len(operations) > 30
    failed, sent = [], 0
    for operation in operations:
        if operation.method.upper() == "POST" and operation.path.startswith(LONG):
            continue

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def attack(case):
            nonlocal sent
            for part in (case.query, case.path_parameters):
                part.update({key: value for key, value in names.items() if key in part})
            answer = case.call(base_url=server.url, timeout=60)
            sent += 1
            assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.status_code} {answer.text[:300]}"

        try:
            attack()
        except Unsatisfiable:
            continue  # nothing about this route can be of a wrong type
        except AssertionError as error:
            failed.append(f"{operation.label}: {error}")
    assert not failed, "\n".join(failed) + "\n" + server.tail()
    assert sent > 100

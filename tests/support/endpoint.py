"""An endpoint for tests that drafts sentences: it speaks the protocol, answers well or badly, and notes requests."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from lib.app.cli import commands as cli
from lib.tasks import ATTRIBUTES, load_concepts, load_task
from lib.tasks.generate import WRITTEN

KEY, MODEL = "sk-right-and-secret", "describer-1"
TASK = load_task("quickstart")


def sentences(name, **changes):
    """What a good model answers for a class."""
    number, side = TASK.classes.index(name), side_of(name)
    made = {a: f"Sentence {number} on the {a} of one rounded body{side}, seen beside its neighbours." for a in WRITTEN}
    return {**made, **changes}


def side_of(name):
    return f" on the {name.split()[0]} side" if name.split()[0] in ("left", "right") else ""


def wordings(name, count, attributes=ATTRIBUTES, **changes):
    """What a good model answers if it is asked for wordings of a class."""
    number, side = TASK.classes.index(name), side_of(name)
    made = {a: [f"Way {n} to word the {a} of body {number}{side}." for n in range(1, count + 1)] for a in attributes}
    return {**made, **changes}


def completion(content, **more):
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return {
        **{"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL},
        "choices": [{"index": 0, "finish_reason": "stop", "message": message, **more}],
    }


def good(name):
    return 200, completion(json.dumps(sentences(name)))


class Endpoint:
    """A Chat Completions server. `script` holds what the next requests are answered with, as functions from the class
    asked for to (status, body[, headers]); when it is empty, good answers follow. `script_of_wordings` is that of the
    requests for wordings. `requests` is what was received."""

    def __init__(self):
        self.script: list[Callable[[str], Any]] = []
        self.script_of_wordings: list[Callable[[str], Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.always: dict[str, Callable[[str], Any]] = {}  # class to its answer, whatever the script says
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.times.append(time.monotonic())
                answer = endpoint.answer(self.path, self.headers.get("Authorization"), body)
                if answer is None:
                    return None  # as if the line were cut
                status, content, *headers = answer
                raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", **(headers[0] if headers else {})}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path, authorization, body):
        if path != "/v1/chat/completions":
            return 404, error("no such path", "invalid_request_error")
        if authorization != f"Bearer {KEY}":
            return 401, error("Incorrect API key provided", "invalid_api_key")
        if body["model"] != MODEL:
            return 404, error(f"The model {body['model']} does not exist", "model_not_found")
        assert [m["role"] for m in body["messages"][:2]] == ["system", "user"]
        name = asked(body)
        if name in self.always:
            return self.always[name](name)
        if about_wordings(body):
            return (self.script_of_wordings.pop(0) if self.script_of_wordings else reworded(body))(name)
        return (self.script.pop(0) if self.script else good)(name)

    def asked(self):
        return [asked(body) for body in self.requests]


def asked(body):
    (name,) = re.findall(r"^(?:Describe|Reword the sentences of) the class '(.+?)'", question(body), re.MULTILINE)
    return name


def question(body):
    return body["messages"][1]["content"]


def about_wordings(body):
    return "Reword the sentences" in question(body)


def given(body):
    """The sentences that are to be reworded."""
    return json.loads(question(body)[question(body).index("{") :])


def reworded(body):
    """A good answer to a request for wordings."""
    (count,) = re.findall(r"each in (\d+) ways", question(body))
    return lambda name: (200, completion(json.dumps(wordings(name, int(count), given(body)))))


def error(message, code):
    return {"error": {"message": message, "type": code, "code": code, "param": None}}


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.http.shutdown()
    endpoint.http.server_close()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "drafted.yaml"


def generate(endpoint, out, *more, key=KEY, task="quickstart", **environment):
    arguments = ["concepts", "generate", str(task), "--base-url", endpoint.url, "--model", MODEL]
    arguments += ["--out", str(out)] if out else []
    return CliRunner().invoke(
        cli.app, [*arguments, *map(str, more)], env={"OPENAI_API_KEY": key, "COLUMNS": "200", **environment}
    )


def drafted(out):
    """The task with a drafted file."""
    return TASK.model_copy(update={"concepts": load_concepts(out)})

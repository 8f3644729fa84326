"""Accounts of an OpenID realm: its tokens, its roles, and a realm that is down."""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from monailabel.client import MONAILabelClient

from lib.volumes.phantoms.studies import write_studies
from support.server import Server
from support.training import SMALL


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "studies"
    write_studies(folder, cases=3, labelled=1, seed=1)
    return folder


class Realm:
    """A realm like Keycloak's: discovery, keys, and tokens for a name and a password."""

    def __init__(self, with_key_set: bool) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = self.key.public_key()
        der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        realm = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                discovery = {"token_endpoint": f"{realm.uri}/token"}
                if with_key_set:
                    discovery["jwks_uri"] = f"{realm.uri}/keys"
                jwk = {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(public)), "kid": "1", "use": "sig"}
                known = {
                    "/.well-known/openid-configuration": discovery,
                    "/keys": {"keys": [jwk]},
                    "": {"public_key": base64.b64encode(der).decode()},
                }
                self.answer(known.get(self.path.removeprefix("/realms/test")))

            def do_POST(self):
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                right = form["password"] == ["word"] and form["client_id"] == ["monailabel-app"]
                role = {"ada": "monailabel-annotator", "rob": "monailabel-admin"}.get(form["username"][0])
                self.answer({"access_token": realm.token(role), "token_type": "Bearer"} if right else None, 401)

            def answer(self, body, otherwise=404):
                self.send_response(200 if body else otherwise)
                self.end_headers()
                self.wfile.write(json.dumps(body or {}).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}/realms/test"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def token(self, role, expires=600, key=None):
        claims = {"preferred_username": "someone", "exp": int(time.time()) + expires, "realm_access": {"roles": [role]}}
        return jwt.encode(claims, key or self.key, algorithm="RS256", headers={"kid": "1"})


@pytest.mark.parametrize("with_key_set", [True, False], ids=["key set", "public key"])
def test_openid(studies, tmp_path, with_key_set):
    realm = Realm(with_key_set)
    settings = {"MONAI_LABEL_AUTH_ENABLE": "true", "MONAI_LABEL_AUTH_REALM_URI": realm.uri}
    with Server(studies, tmp_path / "models", SMALL, **settings) as server:
        client = MONAILabelClient(server.url)
        assert client.auth_enabled() is True
        for path in ("/info/", "/", "/docs", "/openapi.json", "/ohif/", "/static/x"):
            assert server.call("GET", path).status_code == 401, "on this machine too, as with the stock server"
        client.update_auth(client.auth_token("ada", "word"))
        assert client.auth_valid_token()
        assert "quickstart" in client.info()["models"]
        assert server.call("GET", "/info/", elsewhere=True, auth=("ada", "word")).ok, "a browser's way"
        assert server.call("GET", "/info/", elsewhere=True, auth=("ada", "wrong")).status_code == 401

        def status(method, path, token):
            return server.call(method, path, headers={"Authorization": f"Bearer {token}"}).status_code

        assert status("GET", "/info/", realm.token("monailabel-user")) == 200
        assert status("GET", "/info/", realm.token("some-other-role")) == 401
        assert status("GET", "/info/", realm.token("monailabel-user", expires=-5)) == 401
        other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        assert status("GET", "/info/", realm.token("monailabel-admin", key=other)) == 401
        assert status("POST", "/train/none", realm.token("monailabel-annotator")) == 403, "the stock server's rule"
        assert status("POST", "/train/none", realm.token("monailabel-admin")) == 404
        realm.http.shutdown()
        realm.http.server_close()
        assert server.call("GET", "/info/", auth=("rob", "word")).status_code == 503

"""Who may do what: options that set it, files of accounts, waits after failed logins, the table of roles."""

import re

import bcrypt
import pytest

from lib.app.web.access.accounts import UsersFile
from lib.app.web.access.auth import Throttle
from lib.app.web.access.guard import role_needed
from lib.app.web.access.options import OptionError, WebOptions


@pytest.mark.parametrize(
    ("conf", "environment", "reason"),
    [
        ({"insecure": "yes"}, {}, "--conf insecure: expected true or false, got 'yes'"),
        ({"insecure": "true"}, {"BIPVL_TOKEN": "x" * 16}, "choose one"),
        ({}, {"BIPVL_USER": "ada"}, "set both or neither"),
        ({}, {"BIPVL_TOKEN": "short"}, "at least 16"),
        ({"token": "/no/such/file"}, {}, "cannot be read"),
        ({"max_upload_mb": "-1"}, {}, "expected a whole number above 0"),
        ({"hosts": "http://label.example"}, {}, "without scheme, port"),
        ({"cors_origins": "*"}, {}, "scheme://host"),
    ],
)
def test_access_options_that_cannot_be_used(conf, environment, reason):
    with pytest.raises(OptionError, match=re.escape(reason)):
        WebOptions.read(conf, environment)


def test_secrets_leave_the_environment():
    environment = {"BIPVL_USER": "ada", "BIPVL_PASSWORD": "word", "BIPVL_TOKEN": "x" * 16, "HOME": "/"}
    options = WebOptions.read({}, environment)
    assert options.account == ("ada", "word")
    assert environment == {"BIPVL_USER": "ada", "HOME": "/"}
    assert "word" not in repr(options)


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("ada:{hash}", 0o644, "chmod 600"),
        ("ada:{hash}:chief", 0o600, "line 1: unknown role 'chief'; valid are viewer, annotator, admin"),
        ("ada:$apr1$x$y", 0o600, "line 1: expected name:bcrypt-hash[:role]"),
        ("# nobody\n", 0o600, "has no account"),
        ("ada:{hash}\nada:{hash}\n", 0o600, "line 2: 'ada' has two lines"),
    ],
)
def test_accounts_files_that_cannot_be_used(tmp_path, text, mode, reason):
    file = tmp_path / "users"
    file.write_text(text.replace("{hash}", bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()))
    file.chmod(mode)
    with pytest.raises(OptionError, match=re.escape(reason)):
        UsersFile(file)


def test_each_failed_login_doubles_the_wait():
    now = [0.0]
    throttle = Throttle(lambda: now[0])
    waits = []
    for _ in range(8):
        throttle.failed("198.51.100.9")
        waits.append(throttle.wait("198.51.100.9"))
    assert waits == [0, 0, 0, 0, 2, 4, 8, 16]
    assert throttle.wait("198.51.100.8") == 0
    now[0] = 16
    assert throttle.wait("198.51.100.9") == 0
    now[0] = 3600
    throttle.failed("198.51.100.9")
    assert throttle.wait("198.51.100.9") == 0, "forgotten"
    for address in ("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4", "2001:db8::5"):
        throttle.failed(address)
    assert throttle.wait("2001:db8::6") == 2, "one network"


@pytest.mark.parametrize(
    ("method", "path", "role", "in_a_realm"),
    [
        ("GET", "/info/", "viewer", "viewer"),
        ("POST", "/infer/x", "viewer", "viewer"),
        ("POST", "/train/x", "annotator", "admin"),
        ("DELETE", "/train/", "annotator", "admin"),
        ("PUT", "/session/", "annotator", "viewer"),
        ("POST", "/activelearning/x", "annotator", "viewer"),
        ("PUT", "/datastore/label", "annotator", "annotator"),
        ("GET", "/doubts/quickstart", "viewer", "viewer"),
        ("PUT", "/doubts/quickstart", "annotator", "annotator"),
        ("DELETE", "/datastore/label", "admin", "admin"),
        ("PUT", "/model/x", "admin", "admin"),
        ("GET", "/logs", "admin", "admin"),
        ("TRACE", "/info/", "admin", "admin"),
    ],
)
def test_role_table(method, path, role, in_a_realm):
    assert role_needed(method, path) == role
    assert role_needed(method, path, realm=True) == in_a_realm

"""Who may log in: an accounts file, one account and one token from the environment, or an OpenID realm.

Both kinds of accounts turn a name and a password into a bearer token and a bearer token into a user, so that HTTP
Basic, MONAI Label's clients and fixed tokens all end in the same check.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import bcrypt
import jwt
import requests

from lib.app.web.access.options import OptionError, WebOptions, private_text
from lib.upstream import settings

logger = logging.getLogger(__name__)

ROLES = ("viewer", "annotator", "admin")  # each may do what those before it may
TOKEN_SECONDS = 12 * 3600
BCRYPT_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
BCRYPT_BYTES = 72  # bcrypt reads no more of a password, and the library refuses longer ones
NOBODY = bcrypt.hashpw(secrets.token_bytes(16), bcrypt.gensalt(10))  # unknown names take as long as known ones


@dataclass(frozen=True)
class User:
    """Who sent a request. `realm`: the roles come from an OpenID realm, where MONAI Label's own rules count."""

    name: str
    role: str
    realm: bool = False


class AuthUnavailable(Exception):
    """Credentials cannot be judged now: the realm does not answer."""


class Accounts(Protocol):
    """Blocking calls: run them off the event loop."""

    def login(self, name: str, password: str) -> str | None:
        """A bearer token, or None for a wrong name or password."""

    def verify(self, token: str) -> User | None:
        """Whose token it is, or None."""

    def describe(self) -> dict[str, Any]:
        """What GET /auth/ tells clients."""


class UsersFile:
    """One `name:bcrypt hash[:role]` per line, as `htpasswd -B` writes it; read again when it changes.

    Raises:
        OptionError: at construction, for a file or a line that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp = self._stat()
        self._users = self._read()

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Hash and role of an account. A file that became unusable is reported, and the last good one counts."""
        with self._lock:
            try:
                stamp = self._stat()
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._users = self._read()
                    logger.info("Accounts read again: %d", len(self._users))
            except (OSError, OptionError) as error:
                logger.error("The accounts stay as they were: %s", error)
            return self._users.get(name)

    def _stat(self) -> tuple[int, int, int]:
        try:
            status = self.path.stat()
        except OSError as error:
            raise OptionError(f"--conf users: {self.path} cannot be read: {error}") from error
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> dict[str, tuple[bytes, str]]:
        users: dict[str, tuple[bytes, str]] = {}
        for number, line in enumerate(private_text(self.path, "--conf users").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, rest = line.strip().partition(":")
            digest, _, role = rest.partition(":")
            where = f"--conf users: {self.path}, line {number}"
            match = BCRYPT_HASH.fullmatch(digest)
            if not name or not match or not 4 <= int(match[1]) <= 16:
                raise OptionError(f"{where}: expected name:bcrypt-hash[:role], as `htpasswd -nB NAME` prints it")
            if name in users:
                raise OptionError(f"{where}: {name!r} has two lines")
            if (role or "annotator") not in ROLES:
                raise OptionError(f"{where}: unknown role {role!r}; valid are {', '.join(ROLES)}")
            users[name] = digest.encode(), role or "annotator"
        if not users:
            raise OptionError(f"--conf users: {self.path} has no account; add one with `htpasswd -B {self.path} NAME`")
        return users


class OwnAccounts:
    """Accounts of this server. Tokens are signed with a key that lives as long as the process.

    Raises:
        OptionError: at construction, for an accounts file that cannot be used.
    """

    def __init__(self, options: WebOptions) -> None:
        self._file = UsersFile(options.users) if options.users else None
        self._account = options.account
        self._token = options.token
        self._key = secrets.token_bytes(32)

    def login(self, name: str, password: str) -> str | None:
        if self._token and _equal(password, self._token):
            return self._token
        if self._account and name == self._account[0]:
            return self._sign(name) if _equal(password, self._account[1]) else None
        entry = self._file.get(name) if self._file else None
        if not self._file:
            return None
        right = bcrypt.checkpw(password.encode()[:BCRYPT_BYTES], entry[0] if entry else NOBODY)
        return self._sign(name) if entry and right else None

    def verify(self, token: str) -> User | None:
        if self._token and _equal(token, self._token):
            return User("token", "admin")
        try:
            claims = jwt.decode(token, self._key, algorithms=["HS256"], options={"require": ["exp", "sub"]})
        except jwt.InvalidTokenError:
            return None
        # A changed password or a removed account ends its tokens, a changed role counts at once.
        name, entry = claims["sub"], self._entry(claims["sub"])
        return User(name, entry[1]) if entry and _equal(claims.get("fp", ""), self._fingerprint(entry[0])) else None

    def describe(self) -> dict[str, Any]:
        return {"enabled": True, "client_id": "bipvl-label", "realm": ""}

    def _entry(self, name: str) -> tuple[bytes, str] | None:
        if self._account and name == self._account[0]:
            return self._account[1].encode(), "admin"
        return self._file.get(name) if self._file else None

    def _sign(self, name: str) -> str | None:
        entry = self._entry(name)
        if entry is None:
            return None
        now = int(time.time())
        claims = {"sub": name, "iat": now, "exp": now + TOKEN_SECONDS, "fp": self._fingerprint(entry[0])}
        return jwt.encode(claims, self._key, algorithm="HS256")

    def _fingerprint(self, secret: bytes) -> str:
        return hmac.new(self._key, secret, hashlib.sha256).hexdigest()[:32]


class RealmAccounts:
    """MONAI Label's OpenID settings (MONAI_LABEL_AUTH_…): the realm holds the accounts and signs the tokens."""

    KEYS_SECONDS = 300

    def __init__(self) -> None:
        self._uri = settings.MONAI_LABEL_AUTH_REALM_URI.rstrip("/")
        self._lock = threading.Lock()
        self._read_at = -float(self.KEYS_SECONDS)
        self._token_endpoint = ""
        self._keys: jwt.PyJWKClient | None = None
        self._public_key = ""

    def login(self, name: str, password: str) -> str | None:
        self._discover()
        form = {
            "client_id": settings.MONAI_LABEL_AUTH_CLIENT_ID,
            "username": name,
            "password": password,
            "grant_type": "password",
        }
        try:
            answer = requests.post(self._token_endpoint, data=form, timeout=settings.MONAI_LABEL_AUTH_TIMEOUT)
            if answer.status_code in (400, 401, 403):
                return None
            answer.raise_for_status()
            return str(answer.json()["access_token"])
        except (requests.RequestException, ValueError, KeyError) as error:
            raise AuthUnavailable(f"the OpenID realm gave no token: {type(error).__name__}") from error

    def verify(self, token: str) -> User | None:
        try:
            claims = jwt.decode(
                token,
                self._signing_key(token),
                algorithms=["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"],
                options={"verify_aud": False, "require": ["exp"]},
            )
        except jwt.PyJWKClientConnectionError as error:
            raise AuthUnavailable("the OpenID realm's keys cannot be read") from error
        except jwt.PyJWTError:
            return None
        name = claims.get(settings.MONAI_LABEL_AUTH_TOKEN_USERNAME) or claims.get("sub")
        role = _realm_role(claims)
        return User(str(name), role, realm=True) if name and role else None

    def describe(self) -> dict[str, Any]:
        return {"enabled": True, "client_id": settings.MONAI_LABEL_AUTH_CLIENT_ID, "realm": self._uri}

    def _signing_key(self, token: str) -> Any:
        self._discover()
        return self._keys.get_signing_key_from_jwt(token).key if self._keys else self._public_key

    def _discover(self) -> None:
        """Read where the realm's tokens and keys are; a realm without a key set publishes one key itself."""
        with self._lock:
            if time.monotonic() - self._read_at < self.KEYS_SECONDS:
                return
            timeout = settings.MONAI_LABEL_AUTH_TIMEOUT
            try:
                answer = requests.get(f"{self._uri}/.well-known/openid-configuration", timeout=timeout)
                answer.raise_for_status()
                configuration = answer.json()
                self._token_endpoint = str(configuration["token_endpoint"])
                if configuration.get("jwks_uri"):
                    self._keys = self._keys or jwt.PyJWKClient(configuration["jwks_uri"], timeout=timeout)
                else:
                    answer = requests.get(self._uri, timeout=timeout)
                    answer.raise_for_status()
                    body = answer.json()["public_key"]
                    self._public_key = f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----"
            except (requests.RequestException, ValueError, KeyError, TypeError) as error:
                raise AuthUnavailable(f"the OpenID realm {self._uri} does not answer as expected") from error
            self._read_at = time.monotonic()


def _realm_role(claims: dict[str, Any]) -> str | None:
    """The highest role of a token, by MONAI Label's role names; a reviewer reads, as with the stock server."""
    found: Any = claims
    for key in settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        found = found.get(key) if isinstance(found, dict) else None
    names = found if isinstance(found, list) else []
    for role, name in (
        ("admin", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("annotator", settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR),
        ("viewer", settings.MONAI_LABEL_AUTH_ROLE_REVIEWER),
        ("viewer", settings.MONAI_LABEL_AUTH_ROLE_USER),
    ):
        if name in names:
            return role
    return None


def _equal(given: str, expected: str) -> bool:
    """Compare in a time that tells nothing about either."""
    digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)

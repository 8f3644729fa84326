"""The outermost layer of the server: which requests are let in, how large they may be, and what every answer carries.

It never reads a body: it counts what passes.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

from lib.app.web.access.accounts import ROLES, User
from lib.app.web.access.auth import REALM, Authenticator, Refusal
from lib.app.web.access.options import MEGABYTE, WebOptions

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

USER = "bipvl.user"  # where the guard leaves the User in the request's scope
LOCAL_USER = User("local", "admin")
SMALL_BODY = MEGABYTE
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
CHALLENGE = f'Basic realm="{REALM}", charset="UTF-8"'
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"referrer-policy", b"same-origin"),
)

# The first line that fits counts; what fits none is for admins. The last column holds if an OpenID realm decides:
# then MONAI Label's own rules stay.
RULES: tuple[tuple[str, re.Pattern[str], str, str | None], ...] = tuple(
    (methods, re.compile(path), role, realm)
    for methods, path, role, realm in (
        ("GET HEAD", r"/logs(/.*)?", "admin", None),
        ("GET HEAD", r"/datastore/dataset", "viewer", "annotator"),
        ("GET HEAD", r"/model/.*", "viewer", "admin"),
        ("GET HEAD OPTIONS", r"/.*", "viewer", None),
        ("POST", r"/infer/[^/]+", "viewer", None),
        ("POST", r"/activelearning/[^/]+", "annotator", "viewer"),
        ("PUT DELETE", r"/session/[^/]*", "annotator", "viewer"),
        ("PUT", r"/datastore/.*", "annotator", None),
        ("PUT", r"/doubts/[^/]+", "annotator", None),
        ("POST DELETE", r"/(train|batch/infer)/?[^/]*", "annotator", "admin"),
        ("POST DELETE", r"/scoring/[^/]*", "annotator", None),
        ("POST", r"/proxy/.*", "annotator", None),
        ("POST", r"/concepts/[^/]+/(check|try|map)", "viewer", None),
        ("POST", r"/concepts/[^/]+/(review|revisions(/\d+/restore)?)", "annotator", None),
    )
)
PUBLIC = (("GET", "/auth/"), ("GET", "/auth"), ("POST", "/auth/token"))  # to learn how to log in, and to do it
PAGES = re.compile(r"/|/ohif(/.*)?")  # what a link on another site may open


def role_needed(method: str, path: str, realm: bool = False) -> str:
    """The lowest role that may send a request."""
    for methods, pattern, role, realm_role in RULES:
        if method in methods.split() and pattern.fullmatch(path):
            return realm_role if realm and realm_role else role
    return "admin"


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        options: what the person who started the server set.
        auth: judges credentials; None when no accounts are set up.
        realm: the accounts are an OpenID realm's, which counts for programs on this machine too.
    """

    def __init__(self, app: App, options: WebOptions, auth: Authenticator | None, realm: bool = False) -> None:
        self._app, self._options, self._auth = app, options, auth
        self._local = options.local and not realm
        self._own_names = {"localhost", *(n.lower().rstrip(".") for n in (socket.gethostname(), socket.getfqdn()))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        answer = _with_headers(send)
        headers = _Headers(scope["headers"])
        try:
            user = await self._admit(scope, headers)
            limited = self._limited(headers, receive)
        except Refusal as refusal:
            who, what = address_of(scope), (scope["method"], scope["path"][:1000])
            logger.warning("Refused %s %r from %s: %d, %s", *what, who, refusal.status, refusal.message)
            return await _refuse(answer, refusal)
        await self._app({**scope, USER: user}, limited, answer)

    # Who ----------------------------------------------------------------------------------------------------------

    async def _admit(self, scope: Scope, headers: _Headers) -> User:
        host = self._check_host(headers)
        method, path = scope["method"], _path(scope)
        foreign = self._check_origin(method, path, headers)
        if foreign and method == "OPTIONS" and headers.one("access-control-request-method"):
            return User("preflight", "viewer")  # answered by the CORS layer, reaches no route
        local = self._local and self._is_local(scope, headers, host)
        user = await self._user(scope, headers, local, (method, path) in PUBLIC)
        needed = role_needed(method, path, user.realm)
        if (method, path) not in PUBLIC and ROLES.index(user.role) < ROLES.index(needed):
            raise Refusal(403, f"{user.name!r} has the role {user.role}; this needs the role {needed}")
        return user

    async def _user(self, scope: Scope, headers: _Headers, local: bool, public: bool) -> User:
        address = address_of(scope)
        given = headers.one("authorization")
        if self._auth is None:
            if local or self._options.insecure:
                return LOCAL_USER if local else User(address, "admin")
            raise Refusal(
                403,
                f"this server lets in programs on its own machine only, and {address} is elsewhere. Whoever runs it "
                "can set up accounts (--conf users FILE, or the environment variables BIPVL_USER and BIPVL_PASSWORD), "
                "or let everybody in (--conf insecure true)",
            )
        if public:
            return User(address, "viewer")
        user = None
        if given:
            try:
                user = await self._auth.user(given, address)
            except Refusal:
                if not local:
                    raise
        elif scope["method"] == "GET" and _path(scope) == "/datastore/image":
            images = parse_qs(scope["query_string"].decode("latin-1")).get("image", [])
            user = self._auth.downloads.take(address, images[0]) if len(images) == 1 and not local else None
        if user:
            return user
        if local:
            return LOCAL_USER
        reason = "wrong name, password or token" if given else "log in first"
        raise Refusal(401, reason, {"WWW-Authenticate": CHALLENGE})

    def _is_local(self, scope: Scope, headers: _Headers, host: str) -> bool:
        """Sent by a program on this machine, as far as can be told; in doubt it was not.

        A proxy on this machine also connects from here. It is told by the headers that proxies add (uvicorn has put the
        address they name into the scope, or did not trust them), and by a host name that is not this machine's.
        """
        client, server = _ip(scope.get("client")), _ip(scope.get("server"))
        if client is None or any(headers.all(name) for name in FORWARDED):
            return False
        if not (client.is_loopback or client == server):
            return False
        named = _literal(host)
        return host in self._own_names if named is None else named.is_loopback or named == server

    # From which page ----------------------------------------------------------------------------------------------

    def _check_host(self, headers: _Headers) -> str:
        """The name under which the server was addressed. Any other name may be a page that points its own name at
        this server (DNS rebinding)."""
        given = headers.all("host")
        host = _host_port(given[0].lower(), 80)[0].strip("[]") if len(given) == 1 and _plain(given[0]) else ""
        if not host:
            raise Refusal(400, "the request needs one valid Host header")
        if _literal(host) is None and host not in self._own_names and host not in self._options.hosts:
            raise Refusal(
                421, f"this server is not known as {host!r}; whoever runs it can allow the name: --conf hosts {host}"
            )
        return host

    def _check_origin(self, method: str, path: str, headers: _Headers) -> bool:
        """Refuse what another site's page sends. Returns whether a listed page of another origin sends it."""
        origins = headers.all("origin")
        if not origins:
            site = headers.one("sec-fetch-site")
            opens = (
                method == "GET"
                and PAGES.fullmatch(path)
                and headers.one("sec-fetch-mode") == "navigate"
                and headers.one("sec-fetch-dest") in ("", "document")
            )
            if site in ("cross-site", "same-site") and not opens:
                raise Refusal(403, "a page of another site may not use this server")
            return False
        origin = origins[0].lower()
        if len(origins) == 1 and origin in self._options.cors_origins:
            return True
        scheme, _, netloc = origin.partition("://")
        default = {"http": 80, "https": 443}.get(scheme, 0)
        same = _plain(netloc) and _host_port(netloc, default) == _host_port(headers.one("host").lower(), default)
        if len(origins) > 1 or not default or not same:
            raise Refusal(
                403,
                f"a page of {origins[0][:100]!r} may not use this server; whoever runs it can allow it: "
                "--conf cors_origins <scheme://host:port>",
            )
        return False

    # How much -----------------------------------------------------------------------------------------------------

    def _limited(self, headers: _Headers, receive: Receive) -> Receive:
        kind = headers.one("content-type").lower()
        large = kind.startswith(("multipart/", "application/dicom"))
        limit = self._options.max_upload if large else SMALL_BODY
        text = f"the body is larger than {limit // MEGABYTE} MB" + (
            "; whoever runs the server can allow more: --conf max_upload_mb" if large else ""
        )
        length = headers.one("content-length")
        if length.isdigit() and int(length) > limit:
            raise Refusal(413, text, {"Connection": "close"})
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        return limited


class _Headers:
    """Headers by lower-case name; repeated ones are kept apart."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1").strip()) for name, value in pairs]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]

    def one(self, name: str) -> str:
        return next(iter(self.all(name)), "")


def _path(scope: Scope) -> str:
    """The path that routes see: without the prefix of `--root_path`."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] or "/" if root and (path == root or path.startswith(f"{root}/")) else path


def _plain(text: str) -> bool:
    """Host and port only: no user, path or spaces that parsers read differently."""
    return bool(re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", text))


def _host_port(netloc: str, default: int) -> tuple[str, int]:
    """Host and port of what `_plain` accepts."""
    host, _, port = netloc.rpartition(":") if re.search(r":[0-9]+$", netloc) else (netloc, "", "")
    return host.rstrip("."), int(port or default)


def _ip(endpoint: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    return _literal(str(endpoint[0])) if endpoint else None


def _literal(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def address_of(scope: Scope) -> str:
    """The client's address for messages and counters; a proxy can put any text there."""
    address = _ip(scope.get("client"))
    return str(address) if address else "an unknown address"


def _with_headers(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            message = {**message, "headers": headers + [pair for pair in HEADERS if pair[0] not in present]}
        await send(message)

    return sender


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Credentials of requests: HTTP Basic and bearer tokens, off the event loop, cached, and throttled after failures."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lib.app.web.access.accounts import Accounts, AuthUnavailable, User
from lib.app.web.access.downloads import Downloads

logger = logging.getLogger(__name__)

CACHE_SECONDS = 300
CACHE_ENTRIES = 1000
REALM = "BiPVL Label"


class Refusal(Exception):
    """A request that is not let in: HTTP status, a sentence for the user, and headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class Throttle:
    """Failed logins per address: the first few are free, then each doubles the time to wait.

    Args:
        clock: seconds.
    """

    FREE, LONGEST, FORGET, ADDRESSES = 5, 300, 900, 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, address: str) -> int:
        """Seconds until this address may try again; 0 when it may now."""
        count, last = self._failures.get(_network(address), (0, 0.0))
        if count < self.FREE:
            return 0
        return max(0, int(last + min(2 ** (count - self.FREE + 1), self.LONGEST) - self._clock() + 0.999))

    def failed(self, address: str) -> None:
        """Count a failure."""
        key, now = _network(address), self._clock()
        count, last = self._failures.pop(key, (0, now))
        self._failures[key] = (1 if now - last > self.FORGET else min(count + 1, 64), now)
        if len(self._failures) > self.ADDRESSES:
            self._failures.popitem(last=False)


class Authenticator:
    """Judges the credentials of requests.

    Args:
        accounts: who may log in.
    """

    def __init__(self, accounts: Accounts, throttle: Throttle | None = None) -> None:
        self._accounts = accounts
        self._throttle = throttle or Throttle()
        self.downloads = Downloads()
        self._key = secrets.token_bytes(32)
        self._cache: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # of HTTP Basic: keyed hash -> token, until
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def describe(self) -> dict[str, Any]:
        """What GET /auth/ tells clients."""
        return self._accounts.describe()

    async def user(self, header: str, address: str) -> User | None:
        """Who an `Authorization` header belongs to, None for wrong credentials.

        Raises:
            Refusal: 429 after too many failures, 503 when the realm does not answer.
        """
        scheme, _, value = header.strip().partition(" ")
        if scheme.lower() == "bearer":
            return await self._bearer(value.strip(), address)
        if scheme.lower() == "basic":
            return await self._basic(value.strip(), address)
        return None

    async def login(self, name: str, password: str, address: str) -> str | None:
        """A bearer token for a name and a password, None when they are wrong. One attempt per address at a time.

        Raises:
            Refusal: as `user`.
        """
        # By address: what one person's browser sent must not answer another's guesses.
        text = f"{_network(address)}\0{name}\0{password}"
        key = hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        lock, waiting = self._locks.get(address, (asyncio.Lock(), 0))
        self._locks[address] = lock, waiting + 1
        try:
            async with lock:
                token, until = self._cache.get(key, ("", 0.0))
                if token and time.monotonic() < until:
                    return token
                self._check_throttle(address)
                found = await self._off_loop(self._accounts.login, name, password)
                if found is None:
                    self._fail(address, name)
                    return None
                self._cache[key] = found, time.monotonic() + CACHE_SECONDS
                if len(self._cache) > CACHE_ENTRIES:
                    self._cache.popitem(last=False)
                return found
        finally:
            lock, waiting = self._locks[address]
            if waiting > 1:
                self._locks[address] = lock, waiting - 1
            else:
                del self._locks[address]

    async def _basic(self, value: str, address: str) -> User | None:
        try:
            name, colon, password = _text(base64.b64decode(value, validate=True)).partition(":")
        except (binascii.Error, ValueError):
            return None
        token = await self.login(name, password, address) if colon else None
        return await self._off_loop(self._accounts.verify, token) if token else None

    async def _bearer(self, token: str, address: str) -> User | None:
        guess = token.count(".") != 2  # a signed token cannot be guessed, a fixed one could be tried
        if guess:
            self._check_throttle(address)
        user = await self._off_loop(self._accounts.verify, token)
        if user is None and guess:
            self._fail(address, "token")
        return user

    def _check_throttle(self, address: str) -> None:
        wait = self._throttle.wait(address)
        if wait:
            raise Refusal(
                429, f"too many failed logins from {address}; try again in {wait} s", {"Retry-After": str(wait)}
            )

    def _fail(self, address: str, name: str) -> None:
        self._throttle.failed(address)
        logger.warning("Failed login of %r from %s", name[:64], address)

    async def _off_loop(self, function: Callable[..., Any], *arguments: str) -> Any:
        try:
            return await asyncio.to_thread(function, *arguments)
        except AuthUnavailable as error:
            logger.error("%s", error)
            raise Refusal(503, f"{error}; nobody can log in until it does") from error


def _text(data: bytes) -> str:
    """Browsers send UTF-8, some programs Latin-1."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _network(address: str) -> str:
    """What is throttled together: an IPv4 address, or the /64 that one IPv6 customer owns."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))

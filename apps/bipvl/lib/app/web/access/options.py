"""What the person who starts the server sets: `--conf` keys and environment variables about access."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CONF_KEYS = ("users", "token", "insecure", "local", "hosts", "cors_origins", "max_upload_mb")
TOKEN_LENGTH = 16
MEGABYTE = 1 << 20


class OptionError(ValueError):
    """A `--conf` key or environment variable that cannot be used; the message names it and what is valid."""


@dataclass(frozen=True)
class WebOptions:
    """Checked options.

    Args:
        users: accounts file, or None.
        account: (name, password) of the one account that comes from the environment, or None.
        token: fixed bearer token, or None.
        insecure: everybody is let in without credentials.
        local: programs on this machine are let in without credentials.
        hosts: names, beside this machine's own, under which the server may be addressed.
        cors_origins: pages of other origins that may use the server, as `scheme://host[:port]`.
        max_upload: bytes of an upload.
    """

    users: Path | None = None
    account: tuple[str, str] | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    insecure: bool = False
    local: bool = True
    hosts: frozenset[str] = frozenset()
    cors_origins: tuple[str, ...] = ()
    max_upload: int = 4096 * MEGABYTE

    @classmethod
    def read(
        cls, conf: Mapping[str, str], environment: MutableMapping[str, str], origins: Iterable[object] = ()
    ) -> WebOptions:
        """Read and check. The environment's secrets are removed from it, so that no child process inherits them.

        Args:
            origins: more CORS origins (MONAI_LABEL_CORS_ORIGINS).

        Raises:
            OptionError: naming the key and the valid values.
        """
        name, password = environment.get("BIPVL_USER", ""), environment.pop("BIPVL_PASSWORD", "")
        token = environment.pop("BIPVL_TOKEN", "")
        if bool(name) != bool(password):
            raise OptionError("BIPVL_USER and BIPVL_PASSWORD: set both or neither")
        if ":" in name:
            raise OptionError("BIPVL_USER: a user name has no colon")
        if conf.get("token"):
            if token:
                raise OptionError("the token is set twice: by BIPVL_TOKEN and by --conf token; set one of them")
            token = private_text(Path(conf["token"]), "--conf token").strip()
            if not token:
                raise OptionError(f"--conf token: {conf['token']} is empty")
        if token and (len(token) < TOKEN_LENGTH or any(c.isspace() for c in token) or not token.isascii()):
            raise OptionError(
                f"the token (BIPVL_TOKEN or --conf token) has {len(token)} characters; valid is at least "
                f"{TOKEN_LENGTH}, ASCII, without spaces"
            )
        users = conf.get("users") or environment.get("BIPVL_USERS")
        options = cls(
            users=Path(users) if users else None,
            account=(name, password) if name else None,
            token=token or None,
            insecure=_boolean(conf, "insecure", False),
            local=_boolean(conf, "local", True),
            hosts=frozenset(_host(h) for h in _words(conf.get("hosts", ""))),
            cors_origins=tuple(_origin(str(o)) for o in (*_words(conf.get("cors_origins", "")), *origins)),
            max_upload=_megabytes(conf.get("max_upload_mb", "4096")) * MEGABYTE,
        )
        if options.insecure and options.has_accounts:
            raise OptionError("--conf insecure true lets everybody in, but accounts are set up too; choose one")
        return options

    @property
    def has_accounts(self) -> bool:
        return bool(self.users or self.account or self.token)


def private_text(path: Path, option: str) -> str:
    """The text of a file of secrets.

    Raises:
        OptionError: it cannot be read, or other people on this machine can.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise OptionError(f"{option}: {path} can be read or changed by other users; run: chmod 600 {path}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{option}: {path} cannot be read: {error}") from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _boolean(conf: Mapping[str, str], key: str, default: bool) -> bool:
    value = str(conf.get(key, default)).strip().lower()
    if value not in ("true", "false"):
        raise OptionError(f"--conf {key}: expected true or false, got {conf[key]!r}")
    return value == "true"


def _megabytes(text: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise OptionError(f"--conf max_upload_mb: expected a whole number above 0, got {text!r}")
    return int(text)


def _host(text: str) -> str:
    if "/" in text or ":" in text or "*" in text:
        raise OptionError(f"--conf hosts: expected names without scheme, port or *, got {text!r}")
    return text.lower().rstrip(".")


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise OptionError(
            f"cors_origins: expected scheme://host[:port] such as https://viewer.example.org, got {text!r}"
        )
    return f"{parts.scheme}://{parts.netloc.lower()}"

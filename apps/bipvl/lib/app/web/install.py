"""Putting our web side in the place of MONAI Label's, inside the server that `monailabel start_server` runs.

`monailabel.app:app` is what uvicorn calls. Its whole middleware stack, with every stock route behind it, is replaced by
ours, so that no stock endpoint is reachable. Whatever prevents that stops the server.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from monailabel.config import settings

from lib.app.web import ohif, proxy
from lib.app.web.access.accounts import Accounts, OwnAccounts, RealmAccounts
from lib.app.web.access.auth import Authenticator
from lib.app.web.access.guard import Guard
from lib.app.web.access.options import OptionError, WebOptions
from lib.app.web.common import Services, handle_errors
from lib.app.web.routes.agreement import agreement_routes
from lib.app.web.routes.concepts import concept_routes
from lib.app.web.routes.data import datastore_routes, session_routes
from lib.app.web.routes.infer import infer_routes
from lib.app.web.routes.login import auth_routes
from lib.app.web.routes.models import task_routes
from lib.app.web.routes.reports import report_routes
from lib.app.web.routes.start import page_routes
from lib.app.web.uploads import TemporaryFolder

logger = logging.getLogger(__name__)

SECRET = re.compile(
    r"""((?:password|passwd|secret|access_token|token|api_key|authorization)['"]?\s*[:=]\s*['"]?(?:basic |bearer )?)"""
    r"""[^\s'",;&}]+""",
    re.IGNORECASE,
)


def install(app: Any) -> None:
    """Serve `app` through our guard and routes. Call once, when MONAI Label's server starts.

    Raises:
        RuntimeError: this is no MONAI Label server that could be guarded.
        lib.app.web.access.options.OptionError: access options that cannot be used.
    """
    stock = getattr(sys.modules.get("monailabel.app"), "app", None)
    if not isinstance(stock, FastAPI) or getattr(stock, "middleware_stack", None) is None:
        raise RuntimeError("MONAI Label's server has another structure than 0.8.5's: it cannot be guarded, so it stops")
    options = WebOptions.read(app.conf, os.environ, settings.MONAI_LABEL_CORS_ORIGINS)
    realm = settings.MONAI_LABEL_AUTH_ENABLE
    if realm and (options.has_accounts or options.insecure):
        raise OptionError("MONAI_LABEL_AUTH_ENABLE is true: accounts are the realm's; set no users, token or insecure")
    accounts: Accounts | None = RealmAccounts() if realm else OwnAccounts(options) if options.has_accounts else None
    auth = Authenticator(accounts) if accounts else None
    _redact_logs([s for s in (options.token, *(options.account or ())[1:]) if s])
    temporary = TemporaryFolder()
    _at_shutdown(temporary.remove)
    workers = max(1, settings.MONAI_LABEL_INFER_CONCURRENCY)
    services = Services(app, options, auth, app.sessions(), ThreadPoolExecutor(workers, "infer"))
    # The stock routes go as well: should anything build the stock application again, it would answer nothing.
    stock.router.routes.clear()
    stock.middleware_stack = Guard(build(services), options, auth, realm)
    _log_access(options, auth)


def build(services: Services) -> FastAPI:
    """Our application, without the guard."""
    api = FastAPI(
        title=services.app.name,
        description=services.app.description,
        version=services.app.version,
        docs_url=None,
        redoc_url=None,
    )
    api.add_middleware(
        CORSMiddleware,
        allow_origins=services.options.cors_origins,
        allow_credentials=True,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],
    )
    handle_errors(api)
    for make in (
        *(auth_routes, datastore_routes, session_routes, infer_routes),
        *(task_routes, report_routes, concept_routes, agreement_routes),
    ):
        api.include_router(make(services))
    api.include_router(page_routes(api, services))
    api.include_router(ohif.router())
    api.include_router(proxy.router(services.app.studies))
    return api


class _Redact(logging.Filter):
    """Takes secrets out of what is logged: those of this server, and what looks like one in a logged request."""

    def __init__(self, secrets: list[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            return True  # the handler reports a broken message
        clean = SECRET.sub(r"\1***", text)
        for secret in self._secrets:
            clean = clean.replace(secret, "***")
        if clean != text:
            record.msg, record.args = clean, None
        return True


def _redact_logs(secrets: list[str]) -> None:
    """On handlers, where lines of all loggers pass."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in {h for log in loggers for h in log.handlers}:
        for old in [f for f in handler.filters if type(f).__name__ == _Redact.__name__]:
            handler.removeFilter(old)
        handler.addFilter(_Redact(secrets))


def _at_shutdown(call: Callable[[], None]) -> None:
    """Call when the server has answered its last request. uvicorn ends by the signal it received, without Python's
    atexit; its server object is known through the signal's handler. Under another server atexit has to do."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    lifespan = getattr(server, "lifespan", None)
    if lifespan is None:
        return
    shutdown = lifespan.shutdown

    async def wrapped() -> None:
        await shutdown()
        call()

    lifespan.shutdown = wrapped


def _log_access(options: WebOptions, auth: Authenticator | None) -> None:
    if auth:
        logger.info("Who is let in: users with a name and password or a token")
    elif options.insecure:
        logger.warning("Who is let in: EVERYBODY who reaches this port (--conf insecure true)")
    else:
        logger.info("Who is let in: programs on this machine only (docs/running/security.md says how to let others in)")

"""Putting our web side in the place of MONAI Label's, inside the server that `monailabel start_server` runs.

`monailabel.app:app` is what uvicorn calls. Its whole middleware stack, with every stock route behind it, is replaced by
ours, so that no stock endpoint is reachable. Whatever prevents that stops the server.
"""

from __future__ import annotations

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lib.app.web import ohif, proxy
from lib.app.web.access.accounts import Accounts, OwnAccounts, RealmAccounts
from lib.app.web.access.auth import Authenticator
from lib.app.web.access.guard import Guard
from lib.app.web.access.options import OptionError, WebOptions
from lib.app.web.answers import Places, handle_errors
from lib.app.web.common import LabelApp, Services
from lib.app.web.routes.agreement import agreement_routes
from lib.app.web.routes.concepts import concept_routes
from lib.app.web.routes.data import datastore_routes, session_routes
from lib.app.web.routes.doubts import doubt_routes
from lib.app.web.routes.infer import infer_routes
from lib.app.web.routes.login import auth_routes
from lib.app.web.routes.models import task_routes
from lib.app.web.routes.reports import report_routes
from lib.app.web.routes.start import page_routes
from lib.app.web.uploads import TemporaryFolder
from lib.tasks import CONCEPTS_DIR, TASKS_DIR
from lib.upstream import at_shutdown, log_handlers, replace_application, settings, stock_application

logger = logging.getLogger(__name__)

SECRET = re.compile(
    r"""((?:password|passwd|secret|access_token|token|api_key|authorization)['"]?\s*[:=]\s*['"]?(?:basic |bearer )?)"""
    r"""[^\s'",;&}]+""",
    re.IGNORECASE,
)


def install(app: LabelApp) -> None:
    """Serve `app` through our guard and routes. Call once, when MONAI Label's server starts.

    Raises:
        RuntimeError: this is not a MONAI Label server that could be guarded.
        lib.app.web.access.options.OptionError: access options that cannot be used.
    """
    stock = stock_application()
    options = WebOptions.read(app.conf, os.environ, settings.MONAI_LABEL_CORS_ORIGINS)
    realm = settings.MONAI_LABEL_AUTH_ENABLE
    if realm and (options.has_accounts or options.insecure):
        raise OptionError("MONAI_LABEL_AUTH_ENABLE is true: accounts are the realm's; set no users, token or insecure")
    accounts: Accounts | None = RealmAccounts() if realm else OwnAccounts(options) if options.has_accounts else None
    auth = Authenticator(accounts) if accounts else None
    _redact_logs([s for s in (options.token, *(options.account or ())[1:]) if s])
    temporary = TemporaryFolder()
    at_shutdown(temporary.remove)
    workers = max(1, settings.MONAI_LABEL_INFER_CONCURRENCY)
    places = places_of(app, temporary.path)
    services = Services(app, options, auth, app.sessions(), ThreadPoolExecutor(workers, "infer"), places)
    replace_application(stock, Guard(build(services), options, auth, realm))
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
    handle_errors(api, services.places)
    for make in (
        *(auth_routes, datastore_routes, session_routes, infer_routes),
        *(task_routes, report_routes, concept_routes, agreement_routes, doubt_routes),
    ):
        api.include_router(make(services))
    api.include_router(page_routes(api, services))
    api.include_router(ohif.router())
    api.include_router(proxy.router(services.app.studies))
    return api


def places_of(app: LabelApp, temporary: Path) -> Places:
    """The folders of an app, to be kept out of answers."""
    sessions, store = app.sessions(), getattr(app.datastore(), "folder", None)
    own = (app.app_dir, app.model_dir, TASKS_DIR, CONCEPTS_DIR, store, sessions and sessions.folder)
    return Places([folder for folder in own if folder], temporary)


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
    for handler in log_handlers():
        for old in [f for f in handler.filters if type(f).__name__ == _Redact.__name__]:
            handler.removeFilter(old)
        handler.addFilter(_Redact(secrets))


def _log_access(options: WebOptions, auth: Authenticator | None) -> None:
    if auth:
        logger.info("Who is let in: users with a name and password or a token")
    elif options.insecure:
        logger.warning("Who is let in: EVERYBODY who reaches this port (--conf insecure true)")
    else:
        logger.info("Who is let in: programs on this machine only (docs/running/security.md says how to let others in)")

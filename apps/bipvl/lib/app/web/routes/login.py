"""GET /auth/, POST /auth/token and GET /auth/token/valid, as MONAI Label's clients log in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, HTTPException, Request
from pydantic import BaseModel

from lib.app.web.access.accounts import User
from lib.app.web.access.guard import address_of
from lib.app.web.common import ERRORS, Services, current_user


class Token(BaseModel):
    """What a client puts into `Authorization: <token_type> <access_token>`."""

    access_token: str
    token_type: str


def auth_routes(services: Services) -> APIRouter:
    """Routes below /auth."""
    routes = APIRouter(prefix="/auth", tags=["Auth"], responses=ERRORS)

    @routes.get("/", summary="Are there accounts?")
    @routes.get("", include_in_schema=False)
    def enabled() -> dict[str, Any]:
        return services.auth.describe() if services.auth else {"enabled": False, "client_id": "", "realm": ""}

    @routes.post("/token", summary="Log in")
    async def token(request: Request, username: Annotated[str, Form()], password: Annotated[str, Form()]) -> Token:
        if services.auth is None:
            raise HTTPException(404, "this server has no accounts: there is nothing to log in to")
        found = await services.auth.login(username, password, address_of(request.scope))
        if found is None:
            raise HTTPException(401, "wrong name or password")
        return Token(access_token=found, token_type="bearer")

    @routes.get("/token/valid", summary="Whose token is this?")
    async def valid(request: Request, user: Annotated[User, Depends(current_user)]) -> dict[str, Any]:
        # The guard lets programs on this machine in whatever they send: the question is about the token.
        given = request.headers.get("authorization", "")
        owner = await services.auth.user(given, address_of(request.scope)) if services.auth and given else user
        if owner is None:
            raise HTTPException(401, "the token is wrong or has expired")
        return {"username": owner.name, "email": None, "name": owner.name, "roles": [owner.role]}

    return routes

"""Labels checked against the text: which drawn masks fit their sentences least. It reads labels and changes nothing."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query

from lib.app.web.common import ERRORS, Services, choice, known_image
from lib.infers.explain.label_check import check_labels
from lib.upstream import device_list, name_to_device

MOST = 20  # cases per request: each costs a forward pass


def agreement_routes(services: Services) -> APIRouter:
    """`/agreement/<model>?image=<id>&image=<id>`; who may see labels may ask for this."""
    routes = APIRouter(responses=ERRORS)

    @routes.get("/agreement/{model}", tags=["Concepts"], summary="The drawn masks that fit their sentences least")
    async def check(
        model: str, image: Annotated[list[str], Query(description=f"ids of labelled images, at most {MOST}")]
    ) -> dict[str, Any]:
        engine = choice("model", model, services.app.models)
        store = services.app.datastore()
        if len(image) > MOST:
            raise HTTPException(400, f"image: {len(image)} images; a request may name at most {MOST}")
        wanted = list(dict.fromkeys(known_image(store, name) for name in image))

        def work() -> dict[str, Any]:
            version, network, task = engine.loaded(name_to_device(device_list()[0]))
            if not version:
                raise HTTPException(404, f"{model}: no version is published yet, so there is nothing to compare with")
            labelled = {case["id"]: case for case in store.datalist()}
            missing = [name for name in wanted if name not in labelled]
            if missing:
                raise HTTPException(404, f"no final label of {', '.join(missing)}")
            return {"version": version, **check_labels(network, task, [labelled[name] for name in wanted])}

        return await asyncio.get_running_loop().run_in_executor(services.infers, work)

    return routes

"""Links to the archive in its metadata, however the text is cut on its way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from monailabel.config import Settings

from lib.app.web import proxy


def rewritten(text: bytes, size: int, **settings: Any) -> bytes:
    """`text` as it leaves the proxy when it arrives in pieces of this size."""

    async def collect() -> bytes:
        async def pieces():  # noqa: ANN202
            for start in range(0, len(text), size):
                yield text[start : start + size]

        archive = proxy.Archive("https://archive.example:8443/dicom-web/", Settings(**settings))
        return b"".join([piece async for piece in archive.with_our_links(pieces())])

    return asyncio.run(collect())


@pytest.mark.parametrize("size", [1, 2, 7, 50, 51, 52, 53, 54, 10_000])
def test_links_into_the_archive_lead_through_the_proxy(size: int) -> None:
    text = (
        b'[{"BulkDataURI" : "http://archive.example:8443/dicom-web/studies/1/bulk/1"},'
        b'{"BulkDataURI":"https://archive.example:8443/dicom-web/studies/1/bulk/2"},'
        b'{"Value":["https://archive.example:8443/dicom-web/studies/1"]}, "https://other.example/dicom-web/studies/1",'
        b'"https://archive.example:8443/system", "https://archive.example:8443/dicom-web/stu'
    )
    assert rewritten(text, size) == (
        b'[{"BulkDataURI" : "/proxy/dicom/wado/studies/1/bulk/1"},'
        b'{"BulkDataURI":"/proxy/dicom/wado/studies/1/bulk/2"},'
        b'{"Value":["/proxy/dicom/wado/studies/1"]}, "https://other.example/dicom-web/studies/1",'
        b'"https://archive.example:8443/system", "https://archive.example:8443/dicom-web/stu'
    )


@pytest.mark.parametrize("size", [1, 10_000])
def test_prefix_of_the_archive_leaves_the_links(size: int) -> None:
    text = (
        b'["https://archive.example:8443/dicom-web/rs/studies/1", "https://archive.example:8443/dicom-web/studies/1"]'
    )
    expected = b'["/proxy/dicom/wado/studies/1", "/proxy/dicom/wado/studies/1"]'
    assert rewritten(text, size, MONAI_LABEL_WADO_PREFIX="rs") == expected

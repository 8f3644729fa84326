"""What a store of images and labels can refuse."""

from __future__ import annotations


class StoreError(ValueError):
    """A request that the store cannot fulfil; `status` is the HTTP status that says so."""

    status = 400


class NotInStoreError(StoreError):
    """An image or label that does not exist."""

    status = 404


class ReadOnlyError(StoreError):
    """A change to a store that cannot be changed."""

    status = 403


class ConflictError(StoreError):
    """A change that another one, or another file, is in the way of."""

    status = 409


class BusyError(StoreError):
    """Something that others have held for too long; the same request may succeed in a while."""

    status = 503

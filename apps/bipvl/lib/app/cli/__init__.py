"""The command line: the same work without a server."""

from lib.app.cli.commands import cli

__all__ = ["cli"]

"""How a training round goes, in figures and in a sentence, for clients that show it to a person."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lib.upstream import is_running, started

# What Python prints last when the round's process ends by an exception.
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)?: (?P<text>.+)")


def with_progress(task: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """The status of a round, with

    `progress`: epoch, epochs, loss, dice (the latest validation's mean), seconds_left, and stage, the name of a fold;
        None before the first epoch has ended.
    `outcome`: once it has ended, what became of it; empty where nothing is known.

    Args:
        task: MONAI Label's status, which has its times as local time, to the second.
        stats: what the trainer of the round's task wrote last; of an earlier round they do not count.
    """
    if stats.get("start_ts", 0) < int(started(task)):
        stats = {}
    running = is_running(task)
    return {
        **task,
        "progress": _progress(stats) if running and stats.get("epoch") else None,
        "outcome": "" if running else _outcome(task, stats),
    }


def _progress(stats: dict[str, Any]) -> dict[str, Any]:
    latest = stats.get("latest", {})
    return {
        "epoch": stats["epoch"],
        "epochs": stats["total_epochs"],
        "loss": latest.get("loss"),
        "dice": latest.get("val_mean_dice"),
        "seconds_left": stats.get("seconds_left") or 0,
        "stage": stats.get("fold", ""),
    }


def _outcome(task: dict[str, Any], stats: dict[str, Any]) -> str:
    if task["status"] == "STOPPED":
        return "It was stopped."
    if task["status"] != "DONE":
        return _reason(task.get("details", ()))
    if "version" not in stats:
        return ""
    version, gate = stats["version"], stats.get("gate", {})
    what = "is served" if stats.get("served") == version else "is kept, not served"
    return f"Version {version} {what}: {gate['reason']}." if gate.get("reason") else f"Version {version} {what}."


def _reason(lines: Iterable[str]) -> str:
    found = [match["text"] for line in lines if (match := _EXCEPTION.fullmatch(line))]
    return f"{found[-1][:1].upper()}{found[-1][1:500]}" if found else ""

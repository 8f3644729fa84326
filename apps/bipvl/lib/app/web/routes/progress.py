"""How a training round or a batch goes, in figures and in a sentence, for clients that show it to a person."""

from __future__ import annotations

from typing import Any

from lib.upstream import is_running, started

NO_WORD = "Its process ended without a message: it was killed, or could not start. The server's log may say more."


def with_progress(task: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """The status of a round, with

    `progress`: epoch, the last that has ended; epochs; step and steps, of the epoch that runs; loss; dice, the latest
        validation's mean; seconds_left; stage, the name of a fold; and doing, what follows the epochs, if anything:
        `what`, `done` and `total`. None before the first line of figures.
    `outcome`: once it has ended, what became of it.

    Args:
        task: MONAI Label's status.
        stats: what the trainer of the round's task wrote last; of an earlier round they do not count.
    """
    since, failure = int(started(task)), stats.get("failure", {})
    own = stats if stats.get("start_ts", 0) >= since else {}
    running = is_running(task)
    return {
        **task,
        "progress": _progress(own) if running and (own.get("epoch") or own.get("step")) else None,
        "outcome": "" if running else _outcome(task, own, failure if failure.get("start_ts", 0) >= since else {}),
    }


def with_images(task: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    """The status of a batch inference, with

    `progress`: done and total images, and failed, image to reason. None before the first image, and for a batch that
        another has followed.
    `outcome`: once it has ended, how many images are segmented, and which failed.

    Args:
        task: MONAI Label's status.
        batch: of the newest batch (`lib.infers.BatchInfer.progress`).
    """
    own = batch if batch.get("started", 0) >= int(started(task)) else {}
    progress = {key: own[key] for key in ("done", "total", "failed")} if own else None
    outcome = "" if is_running(task) else _ended(task["status"], progress, own.get("error", ""))
    return {**task, "progress": progress, "outcome": outcome}


def _ended(status: str, progress: dict[str, Any] | None, error: str) -> str:
    how = {"DONE": "", "STOPPED": "It was stopped."}.get(status, f"{_sentence(error)}." if error else NO_WORD)
    if progress is None:
        return how
    failed = progress["failed"]
    parts = [how, f"{progress['done'] - len(failed)} of {progress['total']} images are segmented."]
    if failed:
        parts.append(f"Failed: {'; '.join(f'{image}: {reason}' for image, reason in failed.items())}.")
    return " ".join(part for part in parts if part)


def _progress(stats: dict[str, Any]) -> dict[str, Any]:
    latest = stats.get("latest", {})
    return {
        "epoch": stats["epoch"],
        "epochs": stats["total_epochs"],
        "step": stats.get("step", 0),
        "steps": stats.get("steps", 0),
        "loss": latest.get("loss"),
        "dice": latest.get("val_mean_dice"),
        "seconds_left": stats.get("seconds_left") or 0,
        "stage": stats.get("fold", ""),
        "doing": stats.get("doing"),
    }


def _outcome(task: dict[str, Any], stats: dict[str, Any], failure: dict[str, Any]) -> str:
    if task["status"] == "STOPPED":
        return "It was stopped."
    if task["status"] != "DONE":
        return _sentence(failure.get("error", "")) or NO_WORD
    if "version" not in stats:
        return ""
    version, gate = stats["version"], stats.get("gate", {})
    what = "is served" if stats.get("served") == version else "is kept, not served"
    return f"Version {version} {what}: {gate['reason']}." if gate.get("reason") else f"Version {version} {what}."


def _sentence(error: str) -> str:
    """The first line of an error; a table may follow, which the log shows."""
    text = error.strip().partition("\n")[0][:500]
    return f"{text[:1].upper()}{text[1:]}"

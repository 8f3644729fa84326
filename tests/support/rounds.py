"""Training rounds that can be killed: a process that has imported the app once and forks a round on demand.

It is forked itself from one that has imported the packages (forks.py). Importing the app takes as long as the tiny
rounds of the fault tests, and a kill is to meet the round. The parent computes nothing, so that the child starts with
no thread but its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from support import ROOT, forks


class Rounds:
    """Use as a context manager. `start` begins a round, `kill` ends it, `wait` lets it finish."""

    def __init__(self, task: str, changes: dict[str, str], log: Path) -> None:
        self.job = {"task": task, "changes": changes}
        self.log = log

    def __enter__(self) -> Rounds:
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("apps/bipvl", "tests"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        words = ["-m", "support.rounds"]
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        self.jobs, self.answers = open(our_out, "w"), open(our_in)
        with open(its_in) as source, open(its_out, "w") as output:
            self.process: forks.Forked | subprocess.Popen[bytes]
            if forks.AVAILABLE:
                self.process = forks.Forked(words, environment, (source, output, 2))
            else:
                self.process = subprocess.Popen([sys.executable, *words], stdin=source, stdout=output, env=environment)
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.jobs.close()
        self.answers.close()

    def start(self, studies: Path, models: Path, **request: Any) -> int:
        """Begin a round and return its process id."""
        job = {**self.job, "studies": str(studies), "models": str(models), "request": request, "log": str(self.log)}
        self.jobs.write(json.dumps(job) + "\n")
        self.jobs.flush()
        self.pid = int(self._read())
        return self.pid

    def kill(self) -> bool:
        """kill -9 at once; False if the round had already ended."""
        os.kill(self.pid, signal.SIGKILL)
        return int(self._read()) == -signal.SIGKILL

    def wait(self) -> int:
        """Exit code of the round, 0 if it was completed."""
        return int(self._read())

    def _read(self) -> str:
        line = self.answers.readline().strip()
        assert line, f"the process of the rounds has ended; see {self.log}"
        return line


def _run(job: dict[str, Any]) -> None:
    from lib.stores.local import LocalStore
    from lib.tasks import load_task
    from lib.trainers import BiPVLTrain

    task = load_task(job["task"], job["changes"])
    BiPVLTrain(task, Path(job["models"]) / task.name)(job["request"], LocalStore(job["studies"]))


def main() -> None:
    import lib.stores.local  # noqa: F401
    import lib.trainers  # noqa: F401

    print("ready", flush=True)
    pid = None
    for line in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(job["log"], "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                _run(job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        # Looked at, not reaped until the next job: no other process gets this id before a kill arrives.
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert end
        print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, flush=True)


if __name__ == "__main__":
    main()

"""What the allocator's setting does, seen from outside: pages that the kernel has to clear again."""

import subprocess
import sys

import pytest

from support import ROOT

PROGRAM = """
import resource, sys, threading
import numpy as np
sys.path.insert(0, {app!r})
from lib.model.allocator import keep_freed_memory
kept = keep_freed_memory() if {keep} else None

def work():
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**23, 1.0)
    before = faults()
    for _ in range(10):
        np.full(2**23, 1.0)
    print(kept, faults() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(keep: bool, **environment: str) -> tuple[str, int]:
    program = PROGRAM.format(app=str(ROOT / "apps" / "bipvl"), keep=keep)
    environment["NUMPY_MADVISE_HUGEPAGE"] = "0"  # numpy asks for pages of 2 MB, torch does not
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_a_thread_gets_the_memory_of_freed_arrays_back():
    """Ten arrays of 16,384 pages, one after the other, in a thread as a server's requests are."""
    _, before = run(keep=False)
    kept, after = run(keep=True)
    assert kept == "True"
    assert before >= 10 * 16_000
    assert after < 0.8 * before


def test_an_environment_that_sets_the_allocator_is_left_alone():
    kept, _ = run(keep=True, MALLOC_TOP_PAD_="1048576")
    assert kept == "False"

"""How much memory a call takes: measured, or limited, in a forked child that has imported everything already."""

import os
import resource
import traceback
from collections.abc import Callable
from typing import Any


def peak_of(work: Callable[[], Any]) -> int:
    """By how many bytes the resident memory grew at most while `work` ran."""
    return _in_child(work, None)


def peak_within(work: Callable[[], Any], n_bytes: int) -> int:
    """The same, where the child may map no more than `n_bytes` beyond what it has: beyond them it has none."""
    return _in_child(work, n_bytes)


def _in_child(work: Callable[[], Any], limit: int | None) -> int:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        said = "the child ended without a word"
        try:
            before = _status("VmRSS")
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit,) * 2)
            work()
            said = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(write, said.encode()[-4000:])
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said.isdigit(), said
    return int(said)


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

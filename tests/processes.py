"""Several processes as a launcher would start them, forked: nothing is imported again."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def run_in_processes(n: int, target: Callable[..., Any], *args: Any) -> list[int | None]:
    """Call `target` in `n` forked processes that find what a launcher would have set; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        target(*args)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]

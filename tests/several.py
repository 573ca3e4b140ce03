"""Runs a function in several processes at once, which are ranks of one run, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 120
"""Seconds after which processes are taken for hanging."""


def in_processes(
    function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2, limit_s: float = LIMIT_S
) -> list[Any]:
    """Call ``function(*arguments)`` in each of several processes.

    Args:
        function: Of a module.
        folder: Where results are passed on.
        arguments: Given to all.
        count: Processes.
        limit_s: Seconds after which they are taken for hanging.

    Returns:
        What each process returned.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["netllm_pl.run", "tasks.adaptive_bitrate", "tasks.viewport_prediction"])
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    started = [
        context.Process(target=_rank, args=(function, folder, arguments, rank, count, port)) for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(limit_s)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    told = [folder / f"{rank}.error" for rank in range(count)]
    failures = [file.read_text() for file in told if file.exists()]
    codes = [process.exitcode for process in started]
    assert not failures and not any(codes), f"exit codes {codes}\n" + "\n".join(failures)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def free_port() -> int:
    """Return the number of a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank(function: Callable[..., Any], folder: Path, arguments: Any, rank: int, count: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in names.items()}
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    try:
        result = function(*arguments)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""How processes of one run, started by Lightning, torchrun or SLURM, begin together and end together."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from netllm_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

PARENT = "NETLLM_PARENT"
"""Environment variable that holds the process id of the first process of a run, for those that it starts."""
POLL_S = 1.0
"""Seconds between two looks at the parent."""
WAIT_S = 120.0
"""Seconds that processes wait for the first one to tell something."""


def end_with_parent() -> None:
    """End this process when the one of the run that started it has ended, however: it would wait for it for ever.

    The other way round Lightning looks after the processes that it has started; torchrun and SLURM look after all.
    """
    parent = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    if parent is not None and int(parent) == os.getppid():
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def cluster() -> "ClusterEnvironment | None":
    """Return what has started several processes of this run, if it was torchrun or SLURM."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # imported late: it takes a second
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            found: ClusterEnvironment = kind()
            return found if found.world_size() > 1 else None
    return None


def told_by_first(make: Callable[[], str]) -> str:
    """Return a text that the first process makes and tells the others, before torch.distributed is there.

    Args:
        make: Called in the first process, or the only one.

    Raises:
        UserError: The first process cannot be reached; it listens one port above that of torch.distributed.
    """
    found = cluster()
    if found is None:
        return make()
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError

    first, port = found.global_rank() == 0, found.main_port + 1
    text = make() if first else ""
    try:
        store = TCPStore(found.main_address, port, None, first, timedelta(seconds=WAIT_S), wait_for_workers=False)
        if first:
            store.set("text", text)
        text = store.get("text").decode()
        if store.add("told", 1) == found.world_size():
            store.set("all", "")
        if first:
            store.wait(["all"])  # the others read it from this process
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes do not find each other at {found.main_address}:{port} ({reason}); give --run_dir"
        ) from error
    return text

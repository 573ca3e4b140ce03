"""Settings and data that all tests share."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Waiting threads that spin make small operations many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import pytest
import torch

if TYPE_CHECKING:
    from tasks.job_scheduling.workloads import Workload

torch.set_num_threads(1)
# A shell that starts a job in the background lets it ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in a process a core; for chosen files, to start those would take longer than it saves."""
    cores = min(8, os.cpu_count() or 1)
    return cores if config.args_source is pytest.Config.ArgsSource.TESTPATHS and cores > 1 else 0


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the public data sets; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("NETLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set NETLLM_DATA to the folder that holds viewport/")
    return folder


@pytest.fixture(scope="session")
def cjs_logs(data_dir: Path) -> Path:
    """Folder of the logs of the published scheduling simulator."""
    folder = data_dir.parent / "golden" / "cjs"
    if not folder.is_dir():
        pytest.skip(f"no logs of the published program in {folder}")
    return folder


@pytest.fixture(scope="session")
def tpch(data_dir: Path) -> "Workload":
    """The TPC-H profiles."""
    from tasks.job_scheduling.workloads import read_workload  # imported late: few tests need it

    return read_workload(data_dir / "cjs" / "tpch.parquet")


@pytest.fixture(scope="session")
def little_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public data sets cut down, in the same layout: for commands that only need to run."""
    root = tmp_path_factory.mktemp("public") / "data"
    for folder in ("abr", "viewport"):
        (root / folder).mkdir(parents=True)
    for path in sorted(data_dir.glob("abr/*.parquet")):
        table = pd.read_parquet(path).astype({"trace_name": str})
        table = table[table["trace_name"].isin(table["trace_name"].unique()[::10])]
        table.to_parquet(root / "abr" / path.name, index=False)
    for path in sorted(data_dir.glob("viewport/*.parquet")):
        table = pd.read_parquet(path)
        table = table[(table["video"] + table["user"]) % 5 == 0]
        begin = table.groupby(["video", "user"])["t"].transform("min")
        table[table["t"] - begin < 60].to_parquet(root / "viewport" / path.name, index=False)
    for name in ("abr/videos.json", "cjs", "../weights"):
        if (data_dir / name).exists():
            (root / name).symlink_to((data_dir / name).resolve())
    return root


@pytest.fixture(scope="session")
def tiny_backbone() -> Path:
    """Sub-config of a language model with two random layers, which needs no download."""
    return ROOT / "configs" / "llm" / "tiny_random.yaml"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, for tests that would otherwise write into the user's."""
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

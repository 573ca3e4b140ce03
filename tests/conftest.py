"""Settings and data that all tests share."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Waiting threads that spin make small operations many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the public data sets; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("NETLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set NETLLM_DATA to the folder that holds viewport/")
    return folder

"""What the machine is and what it can do at most: the ceilings that measured numbers are held against."""

import ctypes
import gc
import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from netllm_pl import __version__
from netllm_pl.timing import Entry, Work, measure

PACKAGES = ("torch", "lightning", "transformers", "peft", "numpy", "numba")


def environment(device: torch.device) -> Entry:
    """Say on what something is measured: device, processor, threads, versions, and how busy the machine is."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "device_type": device.type,
        "device_memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if gpu else None,
        "processor": _processor(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "netllm_pl": __version__,
        **{name: _version(name) for name in PACKAGES},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int, quick: bool) -> Entry:
    """Measure a large matrix product, and a copy within the device's memory (bytes read and written both count)."""
    gpu = device.type == "cuda"
    size = (4096 if quick else 8192) if gpu else (512 if quick else 1024)
    mega = 1024 if gpu and not quick else 128
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(mega << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def multiply() -> float:
        for _ in range(8):
            torch.mm(a, b, out=product)
        return 8 * 2 * size**3 / 1e12

    def copy() -> float:
        for _ in range(4):
            target.copy_(source)
        return 4 * 2 * len(source) / 1e9

    works = {"matmul": Work("tflop", multiply), "copy": Work("gb", copy)}
    with torch.inference_mode():
        entries = measure(works, repeats, 0.1 if quick else 0.5)
    return {
        "matmul_size": size,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "copy_mib": mega,
        **{f"{name}_{key}": value for name, entry in entries.items() for key, value in entry.items()},
    }


def peak_memory(device: torch.device) -> Entry:
    """Return the most memory in use so far: of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9, "peak_memory_of": "tensors on the GPU"}
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_gb": most / 1e9, "peak_memory_of": "the process since its start"}


def private_memory_gb() -> float:
    """Return the memory that the process itself takes now; its peak where the system does not say.

    Files that are mapped are left out, and what has been freed is given back before: allocators keep some of it.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # not in every C library
        trim(0)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float(peak_memory(torch.device("cpu"))["peak_memory_gb"])
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e9


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def can_write(path: Path) -> bool:
    """Tell whether a file can stand there: it is no folder, and nothing above it is a file."""
    above: Any = next((parent for parent in path.absolute().parents if parent.exists()), None)
    return not path.is_dir() and above is not None and above.is_dir() and os.access(above, os.W_OK)

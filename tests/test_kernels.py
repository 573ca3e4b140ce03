"""Compiled functions: none that is stale is ever run, wherever its machine code is kept."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import caching

import tasks
from netllm_pl.kernels import njit, sources_stamp

ROOT = Path(__file__).parent.parent
SOURCES = {
    "constants": "FACTOR = 2\n",
    "inner": "from netllm_pl.kernels import njit\nfrom tasks.toy_kernels.constants import FACTOR\n\n"
    "@njit()\ndef inner(x):\n    return FACTOR * x\n",
    "outer": "from netllm_pl.kernels import njit\nfrom tasks.toy_kernels.inner import inner\n\n"
    "@njit()\ndef outer(x):\n    return inner(x) + 1\n",
}
Load = Callable[[], Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of three modules; its kernel calls that of the second, which reads a constant of the third."""
    place = tmp_path / "tasks" / "toy_kernels"
    place.mkdir(parents=True)
    for name, source in SOURCES.items():
        (place / f"{name}.py").write_text(source)
    (place / "__init__.py").touch()
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return place


@pytest.fixture
def load(folder: Path) -> Iterator[Load]:
    """Import the task anew, as another process would, and return its kernel."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("tasks.toy_kernels")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def again() -> Any:
        forget()
        return importlib.import_module("tasks.toy_kernels.outer").outer

    yield again
    forget()


def hits(kernel: Any) -> int:
    """How often its machine code came from the disk."""
    return sum(kernel.stats.cache_hits.values())


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_change_in_another_file_is_noticed(
    read_only: bool, folder: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the package may not be written to, and code is kept in the user's cache."""
    if read_only:
        forbid(monkeypatch, lambda place: Path(place).is_relative_to(folder))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(caching.AppDirs, "user_cache_dir", str(tmp_path / "cache"))
    kernel = load()
    assert (kernel(3), hits(kernel)) == (7, 0)
    assert read_only != any(folder.rglob("*.nbi")) and read_only == any((tmp_path / "cache").rglob("*.nbi"))
    kernel = load()
    assert (kernel(3), hits(kernel)) == (7, 1), "what did not change is not compiled again"
    edit(folder / "constants.py", "2", "50")
    kernel = load()
    assert (kernel(3), hits(kernel)) == (151, 0)
    edit(folder / "inner.py", "FACTOR * x", "FACTOR - x")
    kernel = load()
    assert (kernel(3), hits(kernel)) == (48, 0)
    (folder / "unrelated.py").write_text("FACTOR = 3\n")
    kernel = load()
    assert (kernel(3), hits(kernel)) == (48, 1), "only what is imported counts"


def forbid(monkeypatch: pytest.MonkeyPatch, forbidden: Callable[[str], bool]) -> None:
    """Let numba find that it cannot write into folders: access rights would not stop an administrator."""
    allowed = caching._CacheLocator.ensure_cache_path

    def ensure(self: Any) -> None:
        if forbidden(self.get_cache_path()):
            raise PermissionError(self.get_cache_path())
        allowed(self)

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", ensure)


def test_where_nothing_can_be_written_kernels_are_compiled_in_every_process(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, lambda place: True)
    assert load()(3) == 7
    assert not list(tmp_path.rglob("*.nbi"))


def test_all_of_a_package_counts_when_something_is_imported_from_it(folder: Path, load: Load) -> None:
    edit(folder / "inner.py", "from tasks.toy_kernels.constants import", "from tasks.toy_kernels import")
    (folder / "__init__.py").write_text("from tasks.toy_kernels.constants import FACTOR\n")
    kernel = load()
    before = sources_stamp(kernel.py_func)
    edit(folder / "constants.py", "2", "50")
    assert sources_stamp(kernel.py_func) != before


def test_options_are_numbas(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: int) -> int:
        return 2 * x

    assert njit(nogil=True)(double).targetoptions["nogil"]
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert njit()(double) is double


def test_every_kernel_of_the_tasks_is_compiled_so() -> None:
    """Those that numba's own decorator compiles would be found stale only by chance."""
    sources = {file: file.read_text() for package in ("tasks", "callbacks") for file in (ROOT / package).rglob("*.py")}
    assert [str(file) for file, source in sources.items() if "import numba" in source or "from numba" in source] == []
    assert sum("from netllm_pl.kernels import njit" in source for source in sources.values()) >= 7

"""The wheel holds what it should, and the package stays light to import."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import netllm_pl

ROOT = Path(__file__).parent.parent
PACKAGES = ("callbacks", "netllm_pl", "tasks")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend comes with the extra 'test'")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = f"netllm_pl-{netllm_pl.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{about}/METADATA").decode())
        scripts = archive.read(f"{about}/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, about}
    held = {name for name in names if name.endswith(".py")}
    assert held == {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{about}/licenses/LICENSE" in names
    assert (metadata["Name"], metadata["Version"]) == ("netllm-pl", netllm_pl.__version__)
    assert "netllm_pl = netllm_pl.cli:main" in scripts


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    extras = project()["optional-dependencies"]
    for text in [*project()["dependencies"], *extras["test"], *extras["docs"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name != "netllm-pl":
            assert requirement.specifier.contains(pinned[requirement.name]), text


def test_the_small_commands_import_nothing_heavy() -> None:
    heavy = ["torch", "lightning", "transformers", "pandas", "pooch", "tasks"]
    code = f"import sys, netllm_pl.fetch, netllm_pl.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project()["optional-dependencies"]
    found = [Requirement(text) for text in [*project()["dependencies"], *extras["quantize"], *extras["test"]]]
    asked = {requirement.name: requirement for requirement in found if requirement.name != "netllm-pl"}
    assert asked.keys() == lowest.keys()
    for name, requirement in asked.items():
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        oldest, tested = Version(bound), Version(lowest[name])
        assert oldest == tested or (name == "torch" and oldest < tested), name  # older ones have no CPU build

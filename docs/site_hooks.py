"""Hooks of mkdocs.yml: pages of files outside docs/, and links that work on the site and in the repository."""

import logging
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("netllm_pl", "tasks", "callbacks")
LINK = re.compile(r"\[([^\]\n]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""Text, path and anchor of a relative link."""
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
GLUED = re.compile(r"^(?![*-] |\d+\. |[|\s#]).+\n(?=(?:[*-]|\d+\.) |\|)", re.MULTILINE)
"""A line of text right above a list or a table, which Python-Markdown takes for more text."""
log = logging.getLogger("mkdocs.plugins.site_hooks")


def shown() -> dict[str, str]:
    """Map files of the repository outside docs/ to the pages that show them."""
    tasks = {f"tasks/{file.parent.name}/README.md": f"tasks/{file.parent.name}.md" for file in readmes()}
    return {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", **tasks}


def readmes() -> list[Path]:
    """List what the tasks say of themselves."""
    return sorted((ROOT / "tasks").glob("*/README.md"))


def modules() -> list[str]:
    """List the public modules whose docstrings are the reference, such as `netllm_pl.task`."""
    files = [file.relative_to(ROOT) for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    names = [file.parent if file.name == "__init__.py" else file.with_suffix("") for file in files]
    return [".".join(name.parts) for name in names if not name.name.startswith("__")]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the navigation."""
    pages: dict[str, list[Any]] = {package: [] for package in PACKAGES}
    for name in modules():
        pages[name.partition(".")[0]].append({name.partition(".")[2] or name: reference(name)})
    assert config.nav is not None
    config.nav.append({"Reference": [{package: rows} for package, rows in pages.items()]})
    return config


def reference(module: str) -> str:
    """Return the page of a module."""
    return f"reference/{module}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that are not in docs/."""
    for source, page in shown().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in modules():
        files.append(File.generated(config, reference(name), content=f"# {name}\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point relative links at pages of the site; what the site does not hold is named without a link."""
    for glued in GLUED.finditer(FENCED.sub("", markdown)):
        log.warning("%s: put an empty line behind '%s'", page.file.src_uri, glued[0].strip())
    own, pages = page.file.src_uri, shown()
    source = {shown: source for source, shown in pages.items()}.get(own, f"docs/{own}")

    def moved(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        target = normpath(PurePosixPath(source).parent / path)
        found = pages.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(found) is not None:
            return f"[{text}]({relpath(found, str(PurePosixPath(own).parent))}{anchor or ''})"
        # A path that is nowhere stays a link, of which mkdocs complains.
        return text if (ROOT / target).exists() and not target.startswith("docs/") else match[0]

    return LINK.sub(moved, markdown)

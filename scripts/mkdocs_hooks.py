"""What mkdocs.yml needs beside it: pages from outside docs/, and our docstrings as Markdown.

README.md is the first page of the site. A file outside docs/ to which a page links becomes part of the site
under `repository/`, at its path in the repository. Links keep the form that GitHub follows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)")  # of Markdown: ](target, up to a #fragment


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def target(link: str, source: str) -> str | None:
    """The file of the repository that a link of `source` means; None for addresses."""
    if ":" in link:
        return None
    path = os.path.normpath(PurePosixPath(source).parent / link)
    return path if (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            found = {target(link, path) for _, link in LINK.findall(text)} - seen - {None}
            waiting += sorted(file for file in found if not file.startswith("docs/"))
            seen |= found
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = Path(page.file.abs_src_path).resolve().relative_to(ROOT).as_posix()
    here = PurePosixPath(place(path)).parent

    def moved(link: re.Match[str]) -> str:
        file = target(link[2], path)
        return link[0] if file is None else link[1] + os.path.relpath(place(file), here)

    return LINK.sub(moved, markdown)


class Docstrings(griffe.Extension):
    """Our docstrings as Markdown, before their sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(text: str) -> str:
    """Roles become code. So do tables, and paragraphs without an end of a sentence: formulas and examples."""
    text = re.sub(r":[a-z]+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs[1:], start=1):
        if not re.search(r"[.:]$|```|^\w+:\n|^ ", paragraph.rstrip()):
            paragraphs[i] = f"```text\n{paragraph.rstrip()}\n```"
    return "\n\n".join(paragraphs)

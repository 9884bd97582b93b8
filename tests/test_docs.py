"""README and docs/ as readers use them: the code runs, the commands exist, the links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from convinit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [*ROOT.glob("*.md"), *(ROOT / name / "README.md" for name in ("benchmarks", "csrc", "kernels"))]
BLOCK = re.compile(r"(<!-- compiled only: [^\n]*-->\n)?^```python\n(.*?)^```$", re.M | re.S)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s#]+)")

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs a source checkout")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def with_code() -> list[Path]:
    return [path for path in PAGES if path.exists() and BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", with_code(), ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom, in one namespace and an empty folder."""
    text = page.read_text(encoding="utf-8")
    for library in ("accelerate", "matplotlib", "timm", "transformers"):
        if library in text:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))
        code = compile("\n" * line + block[2], page, "exec")  # tracebacks have the page's own lines
        if block[1] is None:
            exec(code, names)


def commands() -> list[str]:
    """The commands of convinit in shell blocks, and in the text where they have arguments."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
        lines += [code for code in re.findall(r"`(convinit [^`\n]+)`", text) if len(code.split()) > 2]
        for line in lines:
            if match := re.search(r"(?:^|&& )(?:convinit|torchrun .*-m convinit\.cli) (.+)", line):
                found.append(shlex.join(shlex.split(match[1], comments=True)))
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_of_convinit(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if "--config" in words or words == ["train", "--help"]:
        return
    if words[0] == "train":  # all settings are checked before they are written
        done = CliRunner().invoke(app, [*words, "--save-config", "run.toml"])
        assert done.exit_code == 0, done.output
        return
    group = typer.main.get_command(app)
    context = group.make_context("convinit", list(words))
    name, subcommand, rest = group.resolve_command(context, words)
    subcommand.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", dict.fromkeys([*PAGES, *OTHERS]), ids=name_of)
def test_links_lead_to_files(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if ":" not in link:
            assert os.path.exists(page.parent / link), link

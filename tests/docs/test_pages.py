"""The documentation: it says what the source says, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.source import ROOT, parsed, python_files, strings
from tests.test_layers import EVERYTHING, MAY_IMPORT

DOCS = ROOT / "docs"
OTHER_HOSTS = {"semver.org", "ui.perfetto.dev"}
"""Those the pages may link to: each was looked at when it was added, for a test cannot ask them."""
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its own heading row."""
    section = page.read_text().split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_layer_table_is_the_one_that_is_checked() -> None:
    written = {}
    for layers, may_import, _ in rows_of(DOCS / "architecture.md", "## Layers"):
        for layer in re.findall("`([^`]+)`", layers):
            allowed = {EVERYTHING} if may_import == "everything" else set(re.findall("`([^`]+)`", may_import))
            written[layer] = allowed
    assert written == MAY_IMPORT


@cache
def texts() -> tuple[str, ...]:
    """Every text of the source; where it puts values in there is a hole."""
    paths = [*python_files("megatron_orz", "tools", "examples"), ROOT / "setup.py"]
    return tuple(text for path in paths for text in strings(parsed(path)))


def is_said(quoted: str) -> bool:
    """Whether some text of the source has the quoted one in it; `...` stands for what varies."""
    parts = [re.escape(part.strip()) for part in quoted.split("...")]
    pattern = re.compile(r"[^\n]*".join(parts))
    return any(pattern.search(text) for text in texts())


QUOTED = re.findall(r"^> `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_an_error_under_troubleshooting_exists(quoted: str) -> None:
    assert is_said(quoted)


def test_an_error_that_nobody_raises_is_found() -> None:
    assert len(QUOTED) > 20
    assert not is_said("world size ... is not a multiple of eleven")


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """As they are, in the repository; `make docs` checks them in the built site."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_is_described(page: Path) -> None:
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text())
    assert [target for text, target in pictures if len(text.split()) < 4] == []


def unsound_urls(text: str) -> list[str]:
    """The URLs of a text that are neither https on a host that is known, nor examples: of this machine, or of `http://a`."""
    found = []
    for url in re.findall(r"\bhttps?:[^\s)>`\"']*", text):
        parts = urlsplit(url)
        is_example = (
            parts.scheme == "http" and parts.hostname and ("." not in parts.hostname or is_loopback(parts.hostname))
        )
        if not is_example and (parts.scheme != "https" or parts.hostname not in OTHER_HOSTS or parts.port is not None):
            found.append(url)
    return found


def is_loopback(host: str) -> bool:
    return re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_other_hosts_are_sound(page: Path) -> None:
    assert unsound_urls(page.read_text()) == []


@pytest.mark.parametrize(
    "url", ["http://semver.org", "https://semver.com/spec", "https:/semver.org", "https://semver.org:8443/", "https://"]
)
def test_an_unsound_link_is_found(url: str) -> None:
    assert unsound_urls(f"See [the rules]({url}), and http://127.0.0.1:8000.") == [url]


def test_files_named_in_the_pages_exist() -> None:
    """`megatron_orz/ppo.py`, `tools/plan.py`, ...: whole paths in backticks."""
    pattern = re.compile(r"`((?:megatron_orz|tools|examples|tests|csrc|docs|bench)/[\w./-]+)`")
    missing = {
        f"{page.name}: {path}"
        for page in PAGES
        for path in pattern.findall(page.read_text())
        if not (ROOT / path).exists()
    }
    assert missing == set()


def test_every_listed_page_exists() -> None:
    sys.path.insert(0, str(DOCS / "hooks"))
    try:
        from site_pages import PAGES_ELSEWHERE, pages  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = list(pages(nav))
    assert len(set(listed)) == len(listed)
    assert {page for page in listed if page not in PAGES_ELSEWHERE and not (DOCS / page).exists()} == set()


def build_site(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does."""
    (options,) = re.findall(r"-m mkdocs build ([^#\n]*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "mkdocs", "build", *options.split(), "--site-dir", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=550)


@pytest.mark.slow
def test_a_build_fails_for_an_anchor_that_is_not_there(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "megatron_orz"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("See [nowhere](step.md#nowhere).\n")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "does not contain an anchor '#nowhere'" in done.stderr


@pytest.mark.slow
def test_the_site_builds_holds_every_page_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build_site(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        assert (tmp_path / page.name).with_suffix(".html").exists()
        assert f'href="{page.stem}.html"' in start or page.stem == "index"
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"""
        r"""|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]+)"""
    )
    assert {page.name: found for page in tmp_path.rglob("*.html") if (found := loaded.findall(page.read_text()))} == {}
    api = (tmp_path / "api.html").read_text()
    for name in ("megatron_orz.ppo.run", "megatron_orz.types.Rollout", "megatron_orz.algorithms.gae.gae"):
        assert f'id="{name}"' in api, name

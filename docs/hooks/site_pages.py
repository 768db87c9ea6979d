"""What mkdocs.yml cannot say: pages whose text lies elsewhere in the repository, and pages that nobody has listed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES_ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
OTHER_PAGES = "More"


def on_config(config: Any) -> Any:
    """Puts pages that `nav` does not list at its end."""
    listed = set(pages(config.nav))
    others = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in listed)
    if others:
        config.nav = [*config.nav, {OTHER_PAGES: others}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages whose text lies elsewhere; their links into docs/ become links to the page beside them."""
    for page, source in PAGES_ELSEWHERE.items():
        text = Path(config.config_file_path).with_name(source).read_text()
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def pages(nav: Any) -> Iterator[str]:
    """The files that a navigation names, section by section."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(entry)

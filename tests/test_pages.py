"""Pages for readers: their links lead somewhere, the contents are complete, and versions agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def links(page: Path) -> list[str]:
    """Return the relative links of a page, without anchors and links within the page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [link for link in found if link and "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](b.md#c) [d](#e) [f](https://g)\n```\n[h](i.md)\n```\n![j](k.png)\n")
    assert links(tmp_path / "page.md") == ["b.md", "k.png"]


@pytest.mark.parametrize(
    ("contents", "folder"), [("README.md", "docs"), ("docs/decisions/README.md", "docs/decisions")]
)
def test_the_contents_list_every_page(folder: str, contents: str) -> None:
    page = ROOT / contents
    listed = {(page.parent / link).resolve() for link in links(page)}
    assert {found.resolve() for found in (ROOT / folder).glob("*.md")} - {page.resolve()} - listed == set()


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    (revision,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text("utf-8")

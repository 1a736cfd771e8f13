"""What `make docs` adds to the pages: the reference, pages that live elsewhere in the repository, folders in the nav.

Links in the pages are those of the repository, so that they work where it is read as files; here they become the
site's.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify as slugs

sys.path.insert(0, str(Path(__file__).parent))
from reference import homes, reference

slugify = slugs(case="lower")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "benchmarks/README.md"]
BESIDE = ["examples/*.png", "examples/*.py", "benchmarks/*.png", "benchmarks/miniature/scenes.py"]
README = (ROOT / "README.md").read_text()
SECTION = re.compile(r"^\[[^\]]+\]\((?:\.\./)*README\.md#(?P<anchor>[\w-]+)\)$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_startup(command: str, dirty: bool) -> None:
    """build/docs/ella_kd: the package as it is installed, of links, for what reads its sources."""
    package = ROOT / "build" / "docs" / "ella_kd"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(ROOT / "ella_kd").iterdir(), ROOT / "samplers", ROOT / "models"]:
        (package / path.name).symlink_to(path)


def on_config(config: MkDocsConfig) -> None:
    """A nav's "FOLDER/*" becomes the pages of the folder that it does not name."""
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))] + list(reference())
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav)))

    def expanded(entry: Any) -> Any:
        if isinstance(entry, list):
            return [each for part in entry for each in _several(expanded(part))]
        if isinstance(entry, dict):
            return {title: expanded(part) for title, part in entry.items()}
        if not entry.endswith("/*"):
            return entry
        return [page for page in pages if page not in named and os.path.dirname(page) == entry[:-2]]

    config.nav = expanded(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> None:
    beside = [path.relative_to(ROOT).as_posix() for glob in BESIDE for path in sorted(ROOT.glob(glob))]
    for name in [*PAGES, *beside]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link that leaves docs/ goes to the page's place on the site; one to a section of the README, alone in its line,
    becomes that section."""
    source = page.file.src_uri
    folder = os.path.dirname(source if source in PAGES or source in reference() else f"docs/{source}")

    def section(found: re.Match[str]) -> str:
        title = next(t for t in re.findall(r"^## (.*)", README, re.MULTILINE) if slugify(t, "-") == found["anchor"])
        text = README[README.index(f"## {title}\n"):].split("\n## ")[0]
        return LINK.sub(lambda link: os.path.relpath(link[0], folder), text)

    def moved(found: re.Match[str]) -> str:
        place = os.path.normpath(os.path.join(folder, found[0])).removeprefix("docs/")
        known = files.get_file_from_path(place) is not None
        return os.path.relpath(place, os.path.dirname(source) or ".") if known else found[0]

    return LINK.sub(moved, SECTION.sub(section, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A drawing stands in the page itself, in its colours; names lead to the reference, papers to arXiv."""
    def drawn(found: re.Match[str]) -> str:
        path = Path(DOCS, os.path.dirname(page.file.src_uri), found["src"])
        return f'<figure class="drawing">{path.read_text()}</figure>'

    def linked(found: re.Match[str]) -> str:
        name, called = found["name"], found["called"]
        if found["link"] or name not in known or not (called or name != name.lower() or "_" in name):
            return found[0]
        place = files.get_file_from_path(known[name].partition("#")[0])
        assert place is not None
        return f'<a href="{place.url_relative_to(page.file)}#{known[name].partition("#")[2]}">{found[0]}</a>'

    known = {} if page.file.src_uri in reference() else {
        name.rpartition(".")[2]: f"{where}#{where[10:-3]}.{name.rpartition('.')[2]}" for name, where in homes().items()}
    html = re.sub(r'<img [^>]*src="(?P<src>[^":]+\.svg)"[^>]*>', drawn, html)
    html = re.sub(r"arXiv (\d{4}\.\d{5})(?!\d|</a>)", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', html)
    return re.sub(r"(?P<link><a [^>]*>)?<code>(?P<name>[A-Za-z]\w*)(?P<called>\([^<]*\))?</code>", linked, html)


def _several(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]

"""Build the API reference and the pages of docs/ into build/docs: ``make docs``. Stops at a warning or a broken link."""

from __future__ import annotations

import pkgutil
import re
import shutil
import sys
import types
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pdoc import doc, render

import fmbseg

DOCS = Path(__file__).resolve().parent


class Links(HTMLParser):
    """What one page points to, and the places in it that can be pointed to."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.targets += [value for name, value in attributes if name in ("href", "src") and value]
        self.places |= {value for name, value in attributes if name == "id"}


def broken_links(folder: Path) -> list[str]:
    """Every link inside the folder that leads to no file, or to no place in its file."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.targets:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            lost = file not in pages if file.suffix == ".html" else not file.is_file()
            if lost or (target.fragment and file in pages and unquote(target.fragment) not in pages[file].places):
                found.append(f"{path.relative_to(folder.resolve())}: {link}")
    return found


def page(path: Path) -> doc.Module:
    """A page of docs/ as a module that has nothing but a docstring, so that names in it are linked as in any other."""
    module = types.ModuleType(path.stem)
    module.__doc__ = re.sub(r"\]\((\w+)\.md(#[\w-]+)?\)", r"](\1.html\2)", path.read_text(encoding="utf-8"))
    return doc.Module(module)


def build(out: Path) -> list[str]:
    """Write everything under ``out``; returns what is wrong: warnings and broken links."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    render.configure(docformat="markdown", template_directory=DOCS / "theme")
    for name in fmbseg.__all__:  # pdoc looks into the package's dictionary, where a lazy name is only once it was used
        setattr(fmbseg, name, getattr(fmbseg, name))
    modules = {path.stem: page(path) for path in sorted(DOCS.glob("*.md"))}
    rooms = [m.name for m in pkgutil.walk_packages(fmbseg.__path__, "fmbseg.") if not m.name.rpartition(".")[2].startswith("_")]
    modules |= {name: doc.Module.from_name(name) for name in ("fmbseg", *rooms)}  # pdoc's own walk ends at a package with __all__
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name, module in modules.items():
            file = out / f"{name.replace('.', '/')}.html"
            file.parent.mkdir(exist_ok=True)
            file.write_text(render.html_module(module, modules), encoding="utf-8")
        (out / "search.js").write_text(render.search_index(modules), encoding="utf-8")
    for picture in (*DOCS.glob("*.svg"), *DOCS.glob("*.png")):
        shutil.copy(picture, out)
    return [*(f"warning: {w.message}" for w in told), *(f"broken link: {link}" for link in broken_links(out))]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS.parent / "build" / "docs")
    wrong = build(folder)
    print("\n".join([*wrong, f"{folder / 'index.html'}"]))
    sys.exit(1 if wrong else 0)

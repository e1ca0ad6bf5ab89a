"""A report as one HTML page and as Markdown with its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup
from tqdm import tqdm

from hft.reporting.figures import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A text, and smaller notes below it, each with a class: better, worse or none."""

    text: str
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportTable:
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]


@dataclass(frozen=True, eq=False)
class Drawing:
    title: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    tables: list[ReportTable] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)

    @property
    def id(self) -> str:
        return slug(self.title)


def write_report(title: str, sections: Sequence[Section], out: Path) -> list[Path]:
    """Write `report.html`, which needs no other file, and `report.md` with its figures; returns the two paths.

    Sections without tables and figures do not appear.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hft.reporting"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [section for section in sections if section.tables or section.drawings]
    drawings = [drawing for section in sections for drawing in section.drawings]
    out.mkdir(parents=True, exist_ok=True)
    svgs, files = {}, {}
    for number, drawing in enumerate(tqdm(drawings, desc="drawing", unit="figure", leave=False), 1):
        name = f"figure-{number:02}-{slug(drawing.title)}"
        svg = to_svg(drawing.figure, name, escape(drawing.title))
        svgs[drawing], files[drawing] = Markup(svg), f"{name}.svg"
        (out / files[drawing]).write_text(svg, encoding="utf-8")
    paths = [out / "report.html", out / "report.md"]
    for path in paths:
        template = environment.get_template(f"{path.name}.jinja")
        text = template.render(title=title, sections=sections, svgs=svgs, files=files)
        path.write_text(text, encoding="utf-8")
    return paths


def slug(words: str) -> str:
    """Words as part of an id or of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

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
from hft.text import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    text: str
    notes: dict[str, str] = field(default_factory=dict)  # smaller, below the text, with their classes: better or worse


@dataclass(frozen=True)
class ReportTable:
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]
    numbers: dict[str, float] = field(default_factory=dict)  # of the table, for wandb's summary


@dataclass(frozen=True, eq=False)
class Drawing:
    title: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    tables: list[ReportTable]
    drawings: list[Drawing]

    @property
    def id(self) -> str:
        return slug(self.title)


def write_report(title: str, sections: Sequence[Section], out: Path) -> list[Path]:
    """Write `report.html`, which needs no other file, and `report.md` with its figures; returns the two paths."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hft.reporting"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["escaped"] = escaped
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
        path.write_text(template.render(title=title, sections=sections, svgs=svgs, files=files), encoding="utf-8")
    return paths


def slug(words: str) -> str:
    """Words as part of an id or of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

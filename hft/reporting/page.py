"""A report as one HTML page and as Markdown with its figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from tqdm import tqdm

from hft.reporting.figures import to_svg
from hft.text import escaped


@dataclass(frozen=True)
class Cell:
    """Of a table; a cell without notes may be a plain string."""

    text: str
    notes: dict[str, str]  # smaller, below the text, with their classes: better or worse


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    caption: str
    head: Row
    rows: list[Row]
    numbers: dict[str, float] = field(default_factory=dict)  # for wandb's summary


@dataclass(frozen=True, eq=False)
class Drawing:
    title: str
    figure: Figure | None


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    tables: list[Table]
    drawings: list[Drawing]


def write_report(title: str, sections: Sequence[Section], out: Path) -> list[Path]:
    """Write `report.html`, which needs no other file, and `report.md` with its figures; returns the two paths."""
    loader, html = jinja2.PackageLoader("hft.reporting"), jinja2.select_autoescape(["html.jinja"])
    how = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, autoescape=html, **how)
    environment.filters |= {"escaped": escaped, "slug": slug}
    drawings = [drawing for section in sections for drawing in section.drawings]
    out.mkdir(parents=True, exist_ok=True)
    svgs, files = {}, {}
    for number, drawing in enumerate(tqdm(drawings, desc="drawing", unit="figure", leave=False), 1):
        name = f"figure-{number:02}-{slug(drawing.title)}"
        svgs[drawing], files[drawing] = Markup(to_svg(drawing.figure, name, escape(drawing.title))), f"{name}.svg"
        (out / files[drawing]).write_text(svgs[drawing], encoding="utf-8")
    paths = [out / "report.html", out / "report.md"]
    for path in paths:
        template = environment.get_template(f"{path.name}.jinja")
        path.write_text(template.render(title=title, sections=sections, svgs=svgs, files=files), encoding="utf-8")
    return paths


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

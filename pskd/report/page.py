"""Self-contained HTML pages: sections of text, tables and pictures become one string.

Nothing is fetched: styles stand in the page, drawings inline as SVG, images as data. There is no
script. Texts are escaped. Light or dark as the reader has it; printed in black on white.

    page("Title", [Section("Results", [Text("..."), Table(header, rows), Drawing(svg, "...")])])
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jinja2

from pskd.report.table import Table

INK = "#010203"  # what is drawn in this colour takes that of the reader's text


@dataclass(frozen=True)
class Text:
    """A paragraph; a notice stands out: what is missing, or what to beware of."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Code:
    """Lines in a fixed-width font, folded away behind `title`."""

    text: str
    title: str


@dataclass(frozen=True)
class Drawing:
    """An SVG file's text. alt: what it shows, for those who cannot see it."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Image:
    """A PNG or JPEG file's bytes, with lines of text below."""

    content: bytes
    alt: str
    lines: Sequence[str] = ()

    @property
    def uri(self) -> str:
        """The content as a `data:` address."""
        kind = "png" if self.content.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Gallery:
    """Small images side by side, `width` pixels wide."""

    images: Sequence[Image]
    width: int = 96


Part = Text | Code | Table | Drawing | Gallery


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it. Titles differ in a page: they are also addresses."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """The title as an id: lower case, with hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def page(title: str, sections: Sequence[Section], lead: Sequence[Part] = ()) -> str:
    """One HTML document. lead: stands between the title and the list of sections."""
    return _template().render(title=title, sections=sections, lead=lead)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pskd.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["inline"] = _inline
    environment.filters["classes"] = _column_classes
    environment.globals["kind"] = lambda part: type(part).__name__
    return environment.get_template("page.html")


def _inline(drawing: Drawing, prefix: str) -> str:
    """The `<svg>` element alone; its texts are escaped.

    Ids get a prefix, as those of several drawings may be equal.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(INK, "currentColor")
    label = html.escape(drawing.alt)
    return re.sub(r"^<svg", f'<svg role="img" aria-label="{label}"', svg)


def _column_classes(table: Table) -> list[str]:
    """`n`, to the right, for each column whose cells all begin as numbers do, or say of none."""
    return [
        "n" if all(re.match(r"[-+]?[\d.]|-?$", row[i]) for row in table.rows) else "t"
        for i in range(len(table.header))
    ]

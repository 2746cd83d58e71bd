"""Pages from the templates in this folder, by jinja2, which escapes what is put into them."""

import base64
from pathlib import Path

import jinja2

from models.spaces import space_of
from models.spaces.space import cell_name
from report.cells import HOW_TO_INSTALL, draw_cell, render
from report.figures import to_svg

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path, template, **content):
    """Write the page that a template makes of the content to an HTML file."""
    page = TEMPLATES.get_template(template).render(content)
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8


def picture(figure):
    """A matplotlib figure as the address of an image, which contains it."""
    return _data_url(to_svg(figure))


def drawings(genotype):
    """The cells of a genotype, each for the macro `cell`. A picture is None if `dot` is missing or fails."""
    return [drawing(genotype, kind) for kind in space_of(genotype).kinds]


def drawing(genotype, kind):
    svg = render(draw_cell(genotype, kind), "svg")
    name, gene = cell_name(kind), str(getattr(genotype, kind))
    return {"name": name, "gene": gene, "svg": svg and _data_url(svg), "how_to_install": HOW_TO_INSTALL}


def _data_url(svg):
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

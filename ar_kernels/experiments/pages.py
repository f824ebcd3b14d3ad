"""HTML pages of one file, which open without a server and fetch nothing."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomically

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222;
       background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } .wrong { color: #b00020; } .note { color: #666; }
img { max-width: 100%; }
"""


def escaped(value: object) -> str:
    """Text for a page."""
    return html.escape(str(value))


def picture(png: bytes, name: str = "", more: str = "") -> str:
    """An <img> that holds its PNG. more: further attributes."""
    return f'<img alt="{escaped(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}" {more}>'


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A <table>; cells are text."""
    lines = ["<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def write_page(path: str | Path, title: str, body: str, style: str = "") -> None:
    """Writes the page, whole or not at all."""
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}{style}</style></head>\n<body>\n<h1>{escaped(title)}</h1>\n{body}\n</body></html>\n"
    )
    write_atomically(path, lambda file: file.write(text.encode()))

"""One look for every report: a page in one file, with its tables and figures inside.

Nothing in it needs a network: no script, no font, no picture that is not in the file.
"""

import re
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em;
  color: #222; background: #fff }
h1 { font-size: 1.6em; margin-bottom: .2em }
h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 2px solid #1f77b4; padding-bottom: .1em }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #ccc; padding: .2em .6em; text-align: right;
  white-space: nowrap }
td:has(> code) { text-align: left; white-space: normal }
td:first-child, th:first-child { text-align: left }
tr:hover td { background: #f4f8fc }
code, pre { font-size: 12px; overflow-wrap: anywhere }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap }
.note { color: #555 }
.bad { color: #a00; font-weight: 600 }
svg { height: auto; max-width: 100% }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """The page as text: a title, then parts that are HTML already."""
    head = escape(title)
    body = "\n".join([f"<h1>{head}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{head}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def heading(text: str) -> str:
    """The title of a part."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; kind: note (grey), bad (red)."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def block(text: str) -> str:
    """Text as it is, as of a file."""
    return f"<pre>{escape(text)}</pre>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], code: bool = False) -> str:
    """A table; None is "-", the last column with `code` in a fixed width."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = ["-" if cell is None else escape(_text(cell)) for cell in row]
        if code:
            cells[-1] = f"<code>{cells[-1]}</code>"
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def inline(svg: str, prefix: str) -> str:
    """The <svg> element of a file; its ids, which other figures have too, begin with prefix.

    The description of the file goes: it names vocabularies by their addresses.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)

"""HTML of what all parts of a page are made of: escaped text, figures, tables, the document around them."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from paraxis.measure.records import Result, Seconds, Study
from paraxis.report import tables

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
Cell = str | tuple[str, float | None]  # HTML, and what it is sorted by where that is not its text
TableRow = tuple[str, Sequence[Cell]]  # class, cells


def part(name: str) -> str:
    """A style sheet or a script of ours."""
    return (files("paraxis.report") / name).read_text(encoding="utf-8")


def document(title: str, body: str, scripts: Sequence[str]) -> str:
    """A page that needs nothing but itself; `title` is text, `body` HTML, `scripts` files beside this one."""
    script = "".join(f"<script>\n{part(name)}</script>\n" for name in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{part('page.css')}</style>\n</head>\n<body>\n"
        f"{body}{script}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """A string of the user's as HTML."""
    return escape(tables.clean(str(value)))


def figure(wide: str, narrow: str, caption: str) -> str:
    """A picture in two widths, of which the style sheet shows one."""
    if not wide:
        return ""
    return (
        f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def time(value: Seconds | None, unit: str = " ms") -> str:
    """Median and interval in ms."""
    if value is None:
        return ""
    return small(f"{tables.milliseconds(value.median)}{unit} {tables.interval(value, '–')}")


def small(figure: str) -> str:
    """A figure with its interval set smaller."""
    return figure.replace(" [", " <small>[").replace("]", "]</small>")


def shown(cell: Cell) -> tuple[str, str]:
    """A cell's HTML and its attribute for sorting."""
    if isinstance(cell, str):
        return cell, ""
    return cell[0], f' data-v="{"" if cell[1] is None else repr(float(cell[1]))}"'


def table(caption: str, heads: Sequence[str], rows: Sequence[TableRow], right: set[str], style: str = "") -> str:
    """A table that scrolls in its own box; columns that nothing fills are left out, those in `right` are figures."""
    kept = [i for i, _ in enumerate(heads) if any(shown(cells[i])[0] for _, cells in rows)]
    look = [' class="n"' if head in right else "" for head in heads]
    head = "".join(f'<th scope="col"{look[i]}>{heads[i]}</th>' for i in kept)
    body = ""
    for name, cells in rows:
        pairs = [shown(cell) for cell in cells]
        data = "".join(f"<td{look[i]}{pairs[i][1]}>{pairs[i][0]}</td>" for i in kept if i)
        first = f'<th scope="row"{pairs[0][1]}>{pairs[0][0]}</th>'
        body += f"<tr{marked(name)}>{first}{data}</tr>\n"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table{marked(style)}>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def marked(name: str) -> str:
    """A class as an attribute."""
    return f' class="{name}"' if name else ""


def kind(study: Study, result: Result) -> str:
    """The class of a plan's row."""
    return "winner" if result is tables.winner(study) else "today" if tables.is_today(study, result) else ""


def plan(study: Study, result: Result) -> str:
    """A plan's name and what one must know about it."""
    tags = ["recommended"] if result is tables.winner(study) else []
    tags += ["oversubscribed"] if result.oversubscribed else []
    tags += [] if result.exact else ["inexact"]
    return text(tables.name(study, result)).replace(",", ",<wbr>") + "".join(
        f' <span class="tag">{tag}</span>' for tag in tags
    )

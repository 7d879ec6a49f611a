"""The Report as one HTML page that needs nothing but itself: pictures are inside it, no script, no network.

Light and dark as the reader's system has it, for print, and for narrow screens.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--ink:#1a1c1f;--soft:#5c636b;--line:#dfe3e8;--page:#fff;--tile:#f5f7f9;--mark:#0b5fa5;
--warn:#8a4b00;--warnback:#fff5e5}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#a0a8b0;--line:#343a41;--page:#15181b;--tile:#1e2226;
--mark:#6db5f2;--warn:#ffc069;--warnback:#33260f}figure img.chart{filter:invert(1) hue-rotate(180deg);
mix-blend-mode:screen}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.25rem;font:16px/1.55 system-ui,sans-serif;color:var(--ink);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .7rem;
border-top:1px solid var(--line);padding-top:1.1rem}
p{max-width:46rem}.soft,figcaption,th,dt{color:var(--soft)}.lead{font-size:1.08rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{background:var(--tile);border-radius:.5rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tile small{color:var(--soft);display:block}
.warn{background:var(--warnback);color:var(--warn);border-left:4px solid;padding:.6rem .9rem;margin:.6rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1.2rem}
figure{margin:0;break-inside:avoid}figure img.chart{width:100%;height:auto;display:block}figcaption{font-size:.88rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500;font-size:.88rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1rem}
.pairs .two{display:flex;gap:2px}.pairs img{width:50%;min-width:0;height:auto;background:var(--tile)}
.pairs figcaption{font-size:.78rem;line-height:1.35}
dl{display:grid;grid-template-columns:minmax(6rem,12rem) 1fr;gap:.25rem 1rem;margin:0}dd{margin:0}
details pre{overflow-x:auto;background:var(--tile);padding:.8rem;border-radius:.5rem;font-size:.82rem}
a{color:var(--mark)}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--page:#fff;--tile:#fff;--warn:#000;--warnback:#fff}
body{max-width:none;padding:0;font-size:10.5pt}.tile{border:1px solid var(--line)}
figure img.chart{filter:none;mix-blend-mode:normal}.charts{grid-template-columns:1fr 1fr}h2{break-after:avoid}
tr,.tile{break-inside:avoid}.scroll{overflow:visible}}
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart with its caption: PNG bytes, and what it shows in words for those who do not see it."""

    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images side by side."""

    first: bytes
    second: bytes
    caption: str


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The page, of sections that are HTML already; title and lead are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p></header>\n<main>\n{"".join(sections)}</main></body></html>\n'
    )


def section(heading: str, *parts: str) -> str:
    """A section; nothing where all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(heading)}</h2>\n{content}\n</section>\n" if content else ""


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: what, how much, and what stands behind it."""
    one = '<div class="tile"><small>{}</small><b>{}</b><small>{}</small></div>'
    return '<div class="tiles">' + "".join(one.format(*map(escape, figure)) for figure in figures) + "</div>"


def warnings(remarks: Sequence[str]) -> str:
    return "".join(f'<p class="warn">{escape(remark)}</p>' for remark in remarks)


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def charts(pictures: Sequence[Picture]) -> str:
    one = '<figure><img class="chart" alt="{}" src="{}"><figcaption>{}</figcaption></figure>'
    found = [one.format(escape(p.caption), _inline(p.png), escape(p.caption)) for p in pictures]
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(found: Sequence[Pair]) -> str:
    one = (
        '<figure><div class="two"><img alt="" src="{}"><img alt="" src="{}"></div><figcaption>{}</figcaption></figure>'
    )
    shown = [one.format(_inline(pair.first), _inline(pair.second), escape(pair.caption)) for pair in found]
    return f'<div class="pairs">{"".join(shown)}</div>' if shown else ""


def definitions(facts: Sequence[tuple[str, str]]) -> str:
    """Terms and what they are; those without a value are left out."""
    return (
        "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in facts if value) + "</dl>"
    )


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def picture(path: Path, caption: str) -> Picture:
    return Picture(path.read_bytes(), caption)


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()

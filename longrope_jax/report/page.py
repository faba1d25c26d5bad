"""Markdown of a report -> one HTML page that needs no other file: its pictures and its style are inside."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure

from longrope_jax.files import write_whole

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5f6670; --line: #d9dce1; --shade: #f4f5f7; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --faint: #a0a7b1; --line: #3a3f47; --shade: #24272c; --page: #17191c; }
}
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; color: var(--text); background: var(--page);
       font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
a { color: inherit; }
nav { columns: 20rem; font-size: .9rem; color: var(--faint); }
nav a { display: block; padding: .1rem 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
tbody tr:hover { background: var(--shade); }
code { padding: .1em .3em; font-size: .9em; background: var(--shade); border-radius: 3px; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; padding: .5rem; background: #fff;
      border: 1px solid var(--line); border-radius: 4px; }
"""


class Picture(NamedTuple):
    """A figure and its place in a report.

    Attributes:
        what: it shows, in words.
        name: of its file.
        figure: what is drawn.
    """

    what: str
    name: str
    figure: Figure

    @property
    def path(self) -> str:
        """Of its file, from where the report is."""
        return f"figures/{self.name}.png"

    def __str__(self) -> str:
        return f"![{self.what}]({self.path})\n"


Parts = list[str | Picture]
"""Paragraphs, headings and tables in Markdown, each with its line break, and the pictures between them."""


def to_page(markdown: str, folder: epath.Path) -> str:
    """The page, titled by its heading, with a list of its sections below that.

    Args:
        markdown: CommonMark with tables, whose first line is the heading; HTML in it is shown, not obeyed.
        folder: what the paths of pictures are relative to.

    Raises:
        OSError: a picture can't be read.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                content = (folder / str(child.attrs["src"])).read_bytes()
                child.attrs["src"] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    title, *sections = _name_headings(tokens)
    links = "".join(f'<a href="#{anchor}">{html.escape(text)}</a>\n' for anchor, text in sections)
    top, rest = (parser.renderer.render(part, parser.options, {}) for part in (tokens[:3], tokens[3:]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title[1])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{top}<nav>\n{links}</nav>\n{rest}</body>\n</html>\n"
    )


def _name_headings(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Gives the title and the sections an id each; returns those with the text of the headings."""
    named: list[tuple[str, str]] = []
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open" and token.tag in ("h1", "h2"):
            anchor = f"section-{len(named)}"
            token.attrs["id"] = anchor
            named.append((anchor, "".join(child.content for child in inline.children or ())))
    return named


def write_pages(folder: epath.Path, name: str, parts: Parts) -> epath.Path:
    """Writes `figures/*.png`, `<name>.md` and `<name>.html`, which holds its pictures; returns the Markdown's path.

    Raises:
        OSError: names the file that can't be written.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for part in parts:
        if isinstance(part, Picture):
            drawn = io.BytesIO()
            part.figure.savefig(drawn)
            write_whole(folder / part.path, drawn.getvalue())
    path, markdown = folder / f"{name}.md", "\n".join(map(str, parts))
    write_whole(path, markdown.encode())
    write_whole(folder / f"{name}.html", to_page(markdown, folder).encode())
    return path

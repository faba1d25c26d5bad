"""Markdown as a page that needs no other file."""

import base64
import re

import pytest
from etils import epath

from longrope_jax.report.page import to_page
from longrope_jax.report.tables import markdown_table

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "dot.png").write_bytes(PNG)
    return epath.Path(tmp_path)


def test_a_page_holds_its_pictures(folder):
    page = to_page("# Report\n\n" + "![a dot](figures/dot.png)\n", folder)
    (source,) = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="a dot"', page)
    assert base64.b64decode(source) == PNG
    assert "figures/" not in page


def test_a_page_has_tables_which_scroll_and_a_list_of_its_sections(folder):
    text = f"# A & B\n\n## First `x`\n\n{markdown_table(['a', 'b'], [['1', '2']])}\n## Second\n\n### Below\n"
    page = to_page(text, folder)
    assert "<title>A &amp; B</title>" in page
    assert '<div class="table"><table>' in page and "<td>2</td>" in page and page.count("</table></div>") == 1
    assert re.findall(r'<a href="#([^"]+)">([^<]+)</a>', page) == [("section-1", "First x"), ("section-2", "Second")]
    assert '<h2 id="section-2">Second</h2>' in page
    assert page.index("<h1") < page.index("<nav>") < page.index("<h2")


def test_what_looks_like_html_in_a_report_is_shown_as_text(folder):
    page = to_page("# Report\n\n<script>alert(1)</script>\n", folder)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_picture_that_is_not_there_is_an_error(folder):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        to_page("# Report\n\n" + "![gone](figures/gone.png)\n", folder)

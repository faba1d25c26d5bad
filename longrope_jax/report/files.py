"""A report as files: Markdown beside its figures, and the same as one page."""

import io
from collections.abc import Mapping

from etils import epath
from matplotlib.figure import Figure

from longrope_jax.report.page import to_page
from longrope_jax.whole_files import write_whole


def write_pages(folder: epath.Path, name: str, markdown: str, figures: Mapping[str, Figure]) -> epath.Path:
    """Writes `figures/*.png`, `<name>.md` and `<name>.html`, which holds its pictures; returns the Markdown's path.

    Args:
        markdown: its pictures are those of `figures`, see `markdown.picture`.

    Raises:
        OSError: names the file that can't be written.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for figure_name, figure in figures.items():
        drawn = io.BytesIO()
        figure.savefig(drawn)
        write_whole(folder / "figures" / f"{figure_name}.png", drawn.getvalue())
    path = folder / f"{name}.md"
    write_whole(path, markdown.encode())
    write_whole(folder / f"{name}.html", to_page(markdown, folder).encode())
    return path

"""Writes a folder of long English prose from two Debian packages: an FAQ on anarchism and the King James Bible.

    python experiments/english_prose.py runs/prose

Every section of the FAQ and every book of the Bible becomes a file: about 200 files and 16 MB, a paragraph a line,
without markup and verse numbers. Needs Debian's `apt-get` and `dpkg-deb`. It installs nothing and needs no root.
"""

import gzip
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("anarchism", "bible-kjv-text", "bible-kjv")
MIN_CHARACTERS = 2000  # shorter texts are indexes or titles


def main(folder: Path) -> None:
    """Writes the texts to `folder`, which it creates."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        unpack(PACKAGES, root)
        texts = {**anarchism(root), **bible(root)}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    print(f"{len(texts)} files, {sum(map(len, texts.values())) / 1e6:.1f} million characters in {folder}")


def unpack(packages: tuple[str, ...], root: Path) -> None:
    """Unpacks the files of Debian packages below `root`."""
    subprocess.run(["apt-get", "download", *packages], cwd=root, check=True, stdout=subprocess.DEVNULL)
    for package in root.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)


def anarchism(root: Path) -> dict[str, str]:
    """Name -> text of every section of `An Anarchist FAQ`."""
    texts = {}
    for path in sorted((root / "usr/share/doc/anarchism/markdown").iterdir()):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = strip_markdown(data.decode())
        if len(text) >= MIN_CHARACTERS:
            texts["anarchism_" + path.name.split(".")[0]] = text
    return texts


def strip_markdown(markdown: str) -> str:
    """Markdown as prose: keeps the text of links; drops emphasis, heading marks and line breaks inside paragraphs."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"^\s*(#+|>|\* \* \*)\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\*\*|(?<!\w)[*_]+|[*_]+(?!\w)", "", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def bible(root: Path) -> dict[str, str]:
    """Name -> text of every book; chapters are paragraphs."""
    command = [root / "usr/bin/bible", "-p", f"{root}/usr/lib/", "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    books: dict[str, dict[str, list[str]]] = {}
    for book, chapter, text in re.findall(r"^(\w+?)(\d+):\d+ (.*)$", verses, re.MULTILINE):
        books.setdefault(book, {}).setdefault(chapter, []).append(text)
    return {
        f"bible_{book}": "\n\n".join(" ".join(chapter) for chapter in chapters.values()) + "\n"
        for book, chapters in books.items()
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

"""Sphinx configuration: `make docs` builds docs/_build/html."""

import pathlib
import typing

import longrope_jax

typing.GENERATING_DOCUMENTATION = "longrope_jax"  # jaxtyping's switch: the pages show types as written

project = "longrope_jax"
author = "the longrope_jax authors"
release = longrope_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "longrope_jax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Single backticks in docstrings are code, as in Markdown, and not a reference.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the class's signature has them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "no-value": True, "ignore-module-all": True}
autodoc_mock_imports = ["lm_eval"]  # requirements-harness.txt has it
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

# Every name of this package must resolve. Other packages' names are not looked up, because that needs the internet.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"typing\..*"),
    ("py:(class|exc)", r"(?!longrope_jax\.).*"),
    ("py:class", r"longrope_jax\..*\.T"),
]


def skip_field_numbers(app, kind, name, member, skip, options):
    """Skips Python's "Alias for field number 0": Attributes already describe a NamedTuple's fields."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def write_api_pages(app):
    """Writes docs/api/generated/PACKAGE.md: the modules of a package, each with its docstrings."""
    root = pathlib.Path(__file__).parents[1]
    generated = root / "docs" / "api" / "generated"
    generated.mkdir(exist_ok=True)
    for stale in generated.glob("*.md"):
        stale.unlink()
    for package in sorted((root / "longrope_jax").rglob("__init__.py")):
        page = ".".join(package.parent.relative_to(root).parts)
        modules = [f"{page}.{path.stem}" for path in sorted(package.parent.glob("*.py")) if path != package]
        sections = [f"# {page}\n\n```{{eval-rst}}\n.. automodule:: {page}\n```\n"]
        sections += [f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in modules]
        (generated / f"{page}.md").write_text("\n".join(sections))


def setup(app):
    """Registers the functions of this file with Sphinx."""
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-skip-member", skip_field_numbers)

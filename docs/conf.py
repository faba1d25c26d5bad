"""How the documentation is built: `make docs`, into docs/_build/html."""

import importlib.metadata
import typing

typing.GENERATING_DOCUMENTATION = "longrope_jax"  # jaxtyping's switch: types are then shown as they are written

project = "longrope_jax"
author = "the longrope_jax authors"
release = importlib.metadata.version("longrope_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
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
autodoc_default_options = {"members": True, "no-value": True}
autodoc_mock_imports = ["lm_eval"]  # requirements-harness.txt has it
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

# Every name of ours has to resolve. Those of others are not looked up: their inventories are on the internet.
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc)", r"(?!longrope_jax\.).*"), ("py:class", r"longrope_jax\..*\.T")]


def skip_field_numbers(app, kind, name, member, skip, options):
    """Fields of a NamedTuple are described under Attributes; what Python says of them is "Alias for field number 0"."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """What Sphinx calls."""
    app.connect("autodoc-skip-member", skip_field_numbers)

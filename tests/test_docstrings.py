"""What a public docstring owes its reader, as far as a program can tell; that the rest is true, people have to see.

ruff (D1) asks for a docstring. Here: the arguments and fields it describes are those that there are, all fields of
settings are among them, errors are named, and where an annotation has no shape, the text has one.
"""

import ast
import pathlib
import re
from collections.abc import Callable, Iterator

PACKAGE = pathlib.Path(__file__).parents[1] / "longrope_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
SHAPE = re.compile(r"\w*\[[^\]]*\]")  # f32[P, D/2], [B, T], f32[]
SHAPED = re.compile(r"\w+\[(Array|np\.\w+)( \| (Array|np\.\w+))*, '[^']*'\]")  # jaxtyping
ARRAYS = re.compile(r"\b(Array|np\.ndarray|ArrayLike)\b")


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public(kind: type) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of all public functions, or classes; methods count if their class is public."""

    def below(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_public(node.name):
                name = f"{prefix}.{node.name}"
                if isinstance(node, kind):
                    yield name, node
                if isinstance(node, ast.ClassDef):
                    yield from below(node.body, name)

    for module, tree in MODULES.items():
        yield from below(tree.body, module)


def text_of(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""


def entries(docstring: str, section: str) -> set[str]:
    """The names that a section of a docstring describes; "a, b: what they are" is two of them."""
    block = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    lines = re.findall(r"^    (\w[\w, ]*):", block[1], re.MULTILINE) if block else []
    return {name.strip() for line in lines for name in line.split(",")}


def arguments(node: ast.FunctionDef) -> dict[str, ast.expr | None]:
    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs + [node.args.vararg, node.args.kwarg]
    return {arg.arg: arg.annotation for arg in every if arg}


def fields(node: ast.ClassDef) -> set[str]:
    return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and is_public(item.target.id)}


def errors(node: ast.AST, helpers: dict[str, ast.FunctionDef], seen: tuple[str, ...] = ()) -> set[str]:
    """Names of the errors that a function raises, itself or through the private functions of its module."""
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Raise) and isinstance(item.exc, ast.Call):
            found.add(ast.unparse(item.exc.func).split(".")[-1])
        if isinstance(item, ast.Call):
            called = ast.unparse(item.func).removeprefix("self.").removeprefix("cls.")
            if called in helpers and called not in seen:
                found |= errors(helpers[called], helpers, (*seen, called))
    return {name for name in found if name[0].isupper()}  # _made_by(...) is a function that makes one


def problems(kind: type, find: Callable[[str, ast.AST], set[str]]) -> dict[str, set[str]]:
    return {name: found for name, node in public(kind) if (found := find(name, node))}


def test_arguments_that_are_described_exist():
    assert not problems(ast.FunctionDef, lambda _, node: entries(text_of(node), "Args") - set(arguments(node)))


def test_fields_are_described():
    assert not problems(ast.ClassDef, lambda _, node: fields(node) - entries(text_of(node), "Attributes"))


def test_errors_are_named():
    helpers = {
        module: {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not is_public(node.name)
        }
        for module, tree in MODULES.items()
    }

    def find(name: str, node: ast.FunctionDef) -> set[str]:
        module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
        return {error for error in errors(node, helpers[module]) if error not in text_of(node)}

    caught = {"main.main"}  # whose errors are a line and an exit status
    assert not {name: found for name, found in problems(ast.FunctionDef, find).items() if name not in caught}


def test_shapes_are_reported():
    def find(_, node: ast.FunctionDef) -> set[str]:
        annotations = arguments(node) | {"the result": node.returns}
        bare = {
            name
            for name, annotation in annotations.items()
            if annotation is not None and ARRAYS.search(SHAPED.sub("", ast.unparse(annotation)))
        }
        return set() if SHAPE.search(text_of(node)) else bare

    assert not problems(ast.FunctionDef, find)


def test_the_checks_see_what_they_look_for():
    node = ast.parse(
        "def f(x: Array, y: Float[Array, 'T']) -> None:\n"
        '    """Of x.\n\n    Args:\n        x, z: what\n            it is.\n    """\n'
        "    _g()\n"
    ).body[0]
    helper = ast.parse("def _g():\n    raise ValueError('no')").body[0]
    assert entries(text_of(node), "Args") - set(arguments(node)) == {"z"}
    assert errors(node, {"_g": helper}) == {"ValueError"}
    assert len(list(public(ast.FunctionDef))) > 300

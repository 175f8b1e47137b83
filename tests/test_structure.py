"""The shape of the project: who imports whom, and what the documents point to."""

import ast
import graphlib
import importlib
import operator
import re
from pathlib import Path

import pytest

from methods import METHODS

ROOT = Path(__file__).parents[1]
# From the bottom up: a file imports from the rows before its own, and from support/ unless said.
ROWS = [
    {"losses", "data", "models", "meta"},
    {"methods"},
    {"options"},
    {"train"},
    {"predict", "detect"},
]
BESIDE = {"compare": set(), "test_losses": {"losses"}}  # what they import of ours, but for support/
SUPPORT = {"__init__", "architectures", "arguments", "coco", "console", "cuda_graphs", "files",
           "images", "interrupt", "picture", "precision", "processes", "run", "second_order",
           "seeds", "synthetic", "terms"}
ALONE = {"losses", "test_losses", "support.second_order", "support.interrupt"}  # without support/
TOOLS = {"benchmark", "faults", "gradients"}
TOP = set.union(*ROWS) | BESIDE.keys()


def names(folder):
    return {path.stem for path in (ROOT / folder).glob("*.py")}


def imports(path):
    """The files of ours that a file imports, "support.x" or "x",
    wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = TOP | TOOLS | {f"support.{name}" for name in SUPPORT} | names("tests")
    return found & ours


def test_every_file_is_known():
    """A new file has a place in the order above; few lie at the top."""
    assert names(".") == TOP and len(TOP) <= 11
    assert names("support") == SUPPORT and names("tools") == TOOLS
    assert not [path for folder in ("support", "tools", "tests")
                for path in (ROOT / folder).glob("*/*.py")]
    assert set(METHODS) == {"lmcl", "mcl", "deep-supervision", "dml", "afd", "independent"}


def test_nothing_in_support_imports_the_top_level_nor_itself_in_a_circle():
    graph = {f"support.{name}": imports(ROOT / "support" / f"{name}.py") for name in SUPPORT}
    assert set.union(*graph.values()) <= graph.keys()
    graphlib.TopologicalSorter(graph).prepare()  # or CycleError, which names the circle
    assert not any(graph[name] for name in ALONE & graph.keys())


def test_no_file_imports_upward():
    below = set()
    for row in ROWS:
        for name in row:
            assert_imports(f"{name}.py", below)
        below |= row
    for name, allowed in BESIDE.items():
        assert_imports(f"{name}.py", allowed)
    for name in TOOLS:
        assert_imports(f"tools/{name}.py", below | {"conftest"} if name == "faults" else below)


def assert_imports(file, allowed):
    found = imports(ROOT / file)
    assert {name for name in found if not name.startswith("support.")} <= allowed, file
    assert not (Path(file).stem in ALONE and found - allowed), file


# ---------------------------------------------------------------- documents

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# modules and objects that are none of ours
OUTSIDE = {"torch", "torchvision", "json", "nn", "self"}
ENDINGS = {"md", "pt", "pt2", "onnx", "png", "jpg", "svg", "json", "jsonl", "tfevents"}
EXAMPLES = {"mine.py", "my_student.py", "my_method.py"}  # a reader's own


def in_python(text):
    """(prefix, name) for what a block of Python imports,
    and for the names that it takes from modules."""
    tree, modules = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
    yield from ((module, "") for module in modules.values())
    for text in (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
        prefix, _, name = text.partition(".")
        if re.fullmatch(r"[\w.]+", name) and (prefix in modules or where(prefix)):
            yield modules.get(prefix, prefix), name


def in_words(text):
    """(prefix, name) for each `file.name` between backticks
    and each file in a block, `folder/file.py`."""
    block = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for kind, inside in block.findall(text):
        if kind == "python":
            yield from in_python(inside)
        else:
            yield from re.findall(r"(?<![\w./-])((?:[\w-]+/)*\w+)\.(py|sh)\b", inside)
    for inside in re.findall(r"`([^`]+)`", block.sub("", text)):
        yield from re.findall(
            r"(?<![\w./~-])((?:[\w-]+/)*[a-z_]\w*)\.([A-Za-z_]\w*(?:\.\w+)*)", inside)


def where(path):
    """The module of a file of ours, named with or without its folder; None for others."""
    for folder in ("", "support/", "tools/", "tests/"):
        if (ROOT / f"{folder}{path.replace('.', '/')}.py").is_file():
            return f"{folder}{path}".replace("/", ".").removeprefix("tools.").removeprefix("tests.")
    return None


def is_there(prefix, name):
    """Whether a page may point to prefix.name."""
    module, ending = where(prefix), name.split(".")[-1]
    if ending == "sh":
        return (ROOT / f"{prefix}.sh").exists()
    if name == "py":
        return bool(module) or f"{prefix}.py" in EXAMPLES
    if not module:
        return prefix.split(".")[0] in OUTSIDE or ending in ENDINGS
    try:
        operator.attrgetter(name or "__name__")(importlib.import_module(module))
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_documents_point_to_exists(page, monkeypatch):
    """`file.name`, files of ours, links: a reader's way from an equation to its line."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    text = page.read_text()
    found = sorted(set(in_words(text)))
    assert [f"{prefix}.{name}" for prefix, name in found if not is_there(prefix, name)] == []
    links = re.findall(r"(?:\]\(|src=\")([^)#:\s\"]+)(?=[)#\"])", text)
    assert [target for target in links if not (page.parent / target).exists()] == []


def test_links_to_sections_lead_somewhere():
    """As GitHub makes them: lower case, no punctuation, a hyphen for each space."""
    anchors = {page: {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in
                      re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)} for page in PAGES}
    wrong = []
    for page in PAGES:
        for target, section in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
            other = (page.parent / target).resolve() if target else page
            wrong += [f"{page.name}: {target}#{section}"] * (section not in anchors.get(other, ()))
    assert wrong == []

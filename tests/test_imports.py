"""The architecture of the package: which file may import which, and how large files may be.

Imports count wherever they are in a file, also inside functions and under ``TYPE_CHECKING``. The package's own
``__init__.py`` does not count: it is the top of the package and refers to the modules below it, on first use.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pruneattn

ROOT = Path(__file__).resolve().parents[1]

#: Layers, lowest first. A file may import files of its own layer and of lower layers. A name is a module at the top of
#: the package or a subpackage. Each ``__main__`` is in the highest layer.
LAYERS = (
    ("errors", "constants"),
    ("files",),
    ("metrics", "plot", "report"),
    ("kernels",),
    ("ops",),
    ("data",),
    ("models",),
    ("checkpoints",),
    ("adapters",),
    ("runtime",),
    ("labelling",),
    ("training",),
    ("cli",),
    ("analysis",),
    ("train", "evaluate", "predict", "export", "convert", "__main__"),
)
MOST_FILES_AT_THE_TOP = 13
MOST_LINES = 400
EXTENSION = "_C"  # compiled, imports nothing


def module_name(path, root):
    """Dotted name of a file, ``pruneattn.ops`` for ``pruneattn/ops/__init__.py``."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(root):
    """``{dotted name: path}`` of the package's Python files."""
    return {module_name(path, root): path for path in sorted(root.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """The files of a package that one of its files imports.

    Attributes:
        found: dotted names of the imported files. The package's own name stands for its ``__init__.py``.
        dynamic: lines of dynamic imports whose name is not a literal.
    """

    def __init__(self, name, path, files, package):
        self.files, self.package = files, package
        self.base = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.found, self.dynamic = set(), []
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def add(self, name):
        """Add the file with the longest dotted name that starts ``name``."""
        parts = name.split(".")
        if parts[0] != self.package or parts[:2] == [self.package, EXTENSION]:
            return
        while ".".join(parts) not in self.files:
            parts.pop()
        self.found.add(".".join(parts))

    def absolute(self, level, name):
        """Absolute form of a name that follows ``level`` dots."""
        if not level:
            return name
        base = self.base.split(".")
        return ".".join([*base[: len(base) - level + 1], *filter(None, [name])])

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)
            if alias.asname is None:  # binds the package itself, and with it all that the package imports on first use
                self.add(alias.name.partition(".")[0])

    def visit_ImportFrom(self, node):
        module = self.absolute(node.level, node.module)
        for alias in node.names:
            self.add(f"{module}.{alias.name}")

    def visit_Call(self, node):
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called not in ("import_module", "__import__"):
            return
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            name = argument.value.lstrip(".")
            self.add(self.absolute(len(argument.value) - len(name), name))
        else:
            self.dynamic.append(node.lineno)


def read(root):
    """``({file: imported files}, dynamic imports)`` of a package, without its own ``__init__.py`` as an importer."""
    files, graph, dynamic = files_of(root), {}, []
    for name, path in files.items():
        if name == root.name:
            continue
        imports = Imports(name, path, files, root.name)
        graph[name] = imports.found - {name}
        dynamic += [f"{path.relative_to(root.parent)}:{line}" for line in imports.dynamic]
    return graph, dynamic


def find_circle(graph):
    """A circle in ``{node: nodes}`` as a list that starts and ends with the same node; empty if there is none."""
    done = set()

    def search(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            circle = search(following, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    return next(filter(None, (search(node, []) for node in sorted(graph))), [])


def part_of(name):
    """Subpackage of a file, or its own name if it is at the top. Each ``__main__`` is a separate part."""
    parts = name.split(".")
    return name if parts[-1] == "__main__" else ".".join(parts[:2])


def layer_of(name):
    """Number of a file's layer. The package's own ``__init__.py`` is above all layers."""
    parts = name.split(".")
    if len(parts) == 1:
        return len(LAYERS)
    unit = "__main__" if parts[-1] == "__main__" else parts[1]
    return next(number for number, names in enumerate(LAYERS) if unit in names)


def parts_graph(graph):
    """The graph of subpackages and top-level modules."""
    parts = {}
    for name, imported in graph.items():
        parts.setdefault(part_of(name), set()).update(map(part_of, imported))
    return {name: imported - {name} for name, imported in parts.items()}


def upward_imports(graph):
    """Imports of a higher layer, as text."""
    return [
        f"{name} imports {imported}"
        for name in graph
        for imported in sorted(graph[name])
        if layer_of(imported) > layer_of(name)
    ]


def files_at_the_top(root):
    """Names of the Python files at the package's top level, without ``__init__`` and ``__main__``."""
    return sorted(path.stem for path in root.glob("*.py") if path.stem not in ("__init__", "__main__"))


def python_files(root):
    """The Python files of a repository: tracked or new, but not ignored; in an archive, all except hidden files."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return [root / name for name in sorted({*listed.stdout.splitlines()}) if (root / name).exists()]
    inside = ((path, path.relative_to(root).parts) for path in sorted(root.rglob("*.py")))
    return [path for path, parts in inside if not any(part.startswith(".") or part == "build" for part in parts)]


def long_files(paths):
    """Files with more than `MOST_LINES` lines, as text."""
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path}: {count} lines" for path, count in counts.items() if count > MOST_LINES]


@pytest.fixture(scope="module")
def graph():
    return read(ROOT / "pruneattn")[0]


def test_every_part_of_the_package_has_one_layer(graph):
    units = [name for names in LAYERS for name in names]
    assert len(units) == len(set(units))
    parts = {"__main__" if name.endswith("__main__") else name.split(".")[1] for name in graph}
    assert parts <= {*units}, "give each new module or subpackage a layer"
    assert {*units} - parts <= {"__main__"}, "remove the layers of files that no longer exist"


def test_imports_are_found(graph):
    assert {"pruneattn.models.blocks", "pruneattn.errors"} <= graph["pruneattn.models.vit"]
    assert "pruneattn.kernels.launch" in graph["pruneattn.ops.attention"]  # imported inside a function
    assert sum(map(len, graph.values())) > 200


def test_files_do_not_import_in_a_circle(graph):
    assert not find_circle(graph)


def test_subpackages_do_not_import_in_a_circle(graph):
    assert not find_circle(parts_graph(graph))


def test_no_import_points_up(graph):
    assert not upward_imports(graph)


def test_names_of_imported_modules_are_literal():
    assert not read(ROOT / "pruneattn")[1]


def test_the_top_of_the_package_has_few_files():
    assert len(files_at_the_top(ROOT / "pruneattn")) <= MOST_FILES_AT_THE_TOP


def test_no_python_file_is_long():
    paths = python_files(ROOT)
    assert {ROOT / "pruneattn" / "__init__.py", Path(__file__).resolve()} <= {*paths}
    assert not long_files(paths)


# The checks themselves, on packages with planted faults ---------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """``package(files)``: the graph and the dynamic imports of a package with these texts, and a few plain modules."""

    def make(**files):
        root = tmp_path / "pruneattn"
        plain = {"__init__": "", "errors": "", "models/__init__": "", "ops/__init__": "", "train": ""}
        for name, text in {**plain, **files}.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read(root)

    return make


@pytest.mark.parametrize(
    "text",
    [
        "from ..train import main",
        "from .. import train",
        "from pruneattn.train import main",
        "from pruneattn import train",
        "import pruneattn.train as x",
        "def f():\n    from ..train import main",
        "class A:\n    def f(self):\n        if self:\n            from .. import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..train import Trainer",
        "try:\n    from ..train import main\nexcept ImportError:\n    main = None",
        "from importlib import import_module\nimport_module('pruneattn.train')",
        "import importlib\nimportlib.import_module('..train', __package__)",
        "__import__('pruneattn.train')",
    ],
)
def test_an_upward_import_is_found_in_every_form(package, text):
    graph, _ = package(**{"models/vit": text})
    assert upward_imports(graph) == ["pruneattn.models.vit imports pruneattn.train"]


@pytest.mark.parametrize(
    "text", ["import pruneattn", "import pruneattn.ops", "from .. import prune", "from pruneattn import prune"]
)
def test_the_package_itself_is_above_its_modules(package, text):
    graph, _ = package(**{"models/vit": text})
    assert upward_imports(graph) == ["pruneattn.models.vit imports pruneattn"]


def test_downward_imports_and_the_extension_are_allowed(package):
    text = "import torch\nfrom .. import _C, ops\nfrom ..errors import UserError\nfrom . import blocks"
    graph, _ = package(**{"models/vit": text, "models/blocks": "", "models/__main__": "from ..train import main"})
    expected = {"pruneattn.ops", "pruneattn.errors", "pruneattn.models.blocks"}
    assert graph["pruneattn.models.vit"] == expected
    assert not upward_imports(graph) and not find_circle(graph) and not find_circle(parts_graph(graph))


def test_a_circle_of_files_is_found(package):
    files = {
        "models/a": "from .b import x",
        "models/b": "def f():\n    from . import c",
        "models/c": "from .a import x",
    }
    graph, _ = package(**files)
    names = [f"pruneattn.models.{name}" for name in "abca"]
    assert find_circle(graph) == names


def test_a_circle_of_subpackages_without_a_circle_of_files_is_found(package):
    files = {"models/a": "from ..ops import b", "ops/b": "", "ops/c": "from ..models import d", "models/d": ""}
    graph, _ = package(**files)
    assert not find_circle(graph)
    assert find_circle(parts_graph(graph)) == ["pruneattn.models", "pruneattn.ops", "pruneattn.models"]


@pytest.mark.parametrize("text", ["import_module(name)", "import_module(f'{__name__}.x')", "__import__(name)"])
def test_a_dynamic_import_is_found(package, text):
    _, dynamic = package(**{"models/vit": f"def f(name):\n    {text}"})
    assert dynamic == ["pruneattn/models/vit.py:2"]


def test_a_part_without_a_layer_is_an_error(package):
    graph, _ = package(unknown="from .errors import UserError")
    with pytest.raises(StopIteration):
        upward_imports(graph)


def test_long_files_and_files_at_the_top_are_counted(package, tmp_path):
    package(__main__="", errors="\n" * MOST_LINES, train="\n" * (MOST_LINES + 1))
    assert files_at_the_top(tmp_path / "pruneattn") == ["errors", "train"]
    assert long_files(python_files(tmp_path)) == [f"{tmp_path / 'pruneattn' / 'train.py'}: {MOST_LINES + 1} lines"]


# The public names of the package --------------------------------------------------------------------------------------


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "pruneattn" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name, "type checkers export a name of a typed package only in this form"
            seen[alias.name] = node.module
    assert seen == {**pruneattn._PUBLIC, **dict.fromkeys(pruneattn._SUBMODULES)}


def test_every_public_name_can_be_imported():
    for name in pruneattn.__all__:
        assert getattr(pruneattn, name) is not None and name in dir(pruneattn)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pruneattn.nothing


def test_importing_the_package_imports_no_library():
    libraries = {"torch", "numpy", "soundfile", "timm", "transformers"}
    code = f"import sys, pruneattn; print(*{libraries} & {{*sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.strip() == ""


def test_the_package_declares_its_types():
    assert (ROOT / "pruneattn" / "py.typed").exists()

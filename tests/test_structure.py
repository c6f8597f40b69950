"""The structure that docs/developing.md describes: order of imports, sizes, package docstrings."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# A module imports modules of lower layers and of its own package. Modules of the first and of the
# last layer may also import others of that layer.
LAYERS = [
    [
        "utils",
        "bitfit.files",
        "bitfit.halving_checks",
        "bitfit.output_paths",
        "bitfit.parsing",
        "bitfit.signals",
        "bitfit.versions",
    ],
    ["bitfit.options", "bitfit.distributed"],
    ["bitfit.data"],
    ["bitfit.model"],
    ["bitfit.results"],
    ["bitfit.tracking"],
    ["bitfit.training"],
    ["bitfit.artifacts"],
    ["glue_evaluator"],
    ["bitfit.tools", "bitfit.study"],
    ["bitfit.cli"],
    ["run_glue", "scripts", "benchmarks"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
LAYERS_WITHIN = (0, len(LAYERS) - 1)
MAX_LINES = {"run_glue.py": 80, "tests": 400}  # of a file or a folder's files; others: 320
MAX_FUNCTION_LINES = 40

PROGRAM = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "bitfit/**/*.py", "scripts/*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
)
TESTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py"))
PACKAGES = [path for path in PROGRAM if path.name == "__init__.py"]


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PROGRAM}


def unit_of(module):
    """Return the unit of LAYERS that a module belongs to, or None."""
    return next((u for u in LAYER_OF if module == u or module.startswith(f"{u}.")), None)


def imported_modules(path, annotations=True):
    """Return the names of the project's modules that a file imports anywhere, in functions too.

    Args:
        annotations: count imports under `if TYPE_CHECKING` too, which serve annotations only.
    """
    found, tree = set(), parse(path)
    guarded = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
        if not annotations
    }
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES} - {"bitfit", module_name(path)}


def wrong_imports(path):
    """Return what a file may not import, or its own name if it belongs to no layer."""
    unit = unit_of(module_name(path))
    if unit is None:
        return {module_name(path)}
    allowed, wrong = LAYER_OF[unit], set()
    for name in imported_modules(path):
        target = unit_of(name)
        layer = LAYER_OF.get(target, allowed)
        if layer > allowed or (
            layer == allowed and target != unit and allowed not in LAYERS_WITHIN
        ):
            wrong.add(name)
    return wrong


def functions(path):
    """Yield (name, number of lines) of every function in a file."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def defined_names(tree):
    """Return the names of the functions and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def positional_calls(path):
    """Return the calls of the project's functions with more than three positional arguments.

    They are found by the names of functions of the file, of imported ones, and of those after
    `self.` or the name of an imported module.
    """
    tree = parse(path)
    known, modules = defined_names(tree), {"self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and unit_of(node.module or ""):
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in MODULES
                (modules if is_module else known).add(alias.asname or alias.name)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > 3:
            base, _, name = ast.unparse(node.func).rpartition(".")
            is_ours = base in modules or (not base and name in known)
            if is_ours and not any(isinstance(argument, ast.Starred) for argument in node.args):
                found.append(f"line {node.lineno}: {name}")
    return found


def line_limit(path):
    return MAX_LINES.get(str(path), MAX_LINES.get(path.parts[0], 320))


# Files that do not meet a rule yet. The lists have to become empty: a file that meets the rule
# must be removed from its list.
WRONG_IMPORTS: list[str] = []
LONG_FILES: list[str] = []
LONG_FUNCTIONS = ["tests/simulated_gpu.py"]
BAD_PACKAGE_DOCSTRINGS: list[str] = []


def compare_to_exceptions(found, exceptions):
    """Fail for a violation that is not listed, and for a listed file without a violation.

    Args:
        found: {path: description of the violation}.
    """
    names = {str(path): text for path, text in found.items() if text}
    new = {name: text for name, text in names.items() if name not in exceptions}
    assert not new, "\n".join(f"{name}: {text}" for name, text in new.items())
    assert not set(exceptions) - set(names), "remove these from the list of exceptions"


def test_every_file_imports_lower_layers_only():
    files = [path for path in PROGRAM if path != Path("bitfit/__init__.py")]
    compare_to_exceptions(
        {path: ", ".join(sorted(wrong_imports(path))) for path in files}, WRONG_IMPORTS
    )


def test_no_modules_import_each_other():
    TopologicalSorter({module_name(p): imported_modules(p, False) for p in PROGRAM}).prepare()


def test_files_are_short():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in PROGRAM + TESTS}
    too_long = {
        path: f"{count} lines, at most {line_limit(path)}"
        for path, count in lines.items()
        if count > line_limit(path)
    }
    compare_to_exceptions(too_long, LONG_FILES)


def test_functions_are_short():
    found = {
        path: ", ".join(
            f"{n}: {count}" for n, count in functions(path) if count > MAX_FUNCTION_LINES
        )
        for path in PROGRAM + TESTS
    }
    compare_to_exceptions(found, LONG_FUNCTIONS)


def test_calls_with_more_than_three_arguments_use_keywords():
    compare_to_exceptions({path: ", ".join(positional_calls(path)) for path in PROGRAM}, [])


def package_error(path):
    """Return what is wrong with an `__init__.py`, or an empty string."""
    tree = parse(path)
    docstring = " ".join((ast.get_docstring(tree) or "").split())
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z`])", docstring)
    if len(tree.body) != bool(docstring):
        return "has code beside its docstring"
    return "" if len(sentences) == 2 else f"has {len(sentences)} sentences"


def test_every_package_says_in_two_sentences_what_belongs_there():
    compare_to_exceptions({path: package_error(path) for path in PACKAGES}, BAD_PACKAGE_DOCSTRINGS)


def test_a_wrong_import_is_found(tmp_path, monkeypatch):
    """In a function, too, and under TYPE_CHECKING."""
    monkeypatch.setattr("test_structure.ROOT", tmp_path)
    (tmp_path / "bitfit/data").mkdir(parents=True)
    path = Path("bitfit/data/tasks.py")
    (tmp_path / path).write_text(
        "import utils\nif TYPE_CHECKING:\n    import glue_evaluator\n"
        "def f():\n    from bitfit.data import tasks\n    import run_glue\n"
    )
    assert wrong_imports(path) == {"glue_evaluator", "run_glue"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('"""First. Second."""', ""),
        ('"""First."""', "has 1 sentences"),
        ("import utils", "has code beside its docstring"),
        ('"""First. Second."""\nimport utils', "has code beside its docstring"),
    ],
)
def test_a_package_docstring_that_breaks_the_rule_is_found(tmp_path, monkeypatch, text, error):
    monkeypatch.setattr("test_structure.ROOT", tmp_path)
    (tmp_path / "__init__.py").write_text(text)
    assert package_error(Path("__init__.py")) == error

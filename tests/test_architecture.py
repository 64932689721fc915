"""The arrows between the layers, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hvpopt"


def imports(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "hvpopt":
                yield from (f"hvpopt.{alias.name}" for alias in node.names)
            else:
                yield node.module


def users_of(*names):
    """The files that import one of the packages, relative to hvpopt."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in names)
    }


def test_only_the_lightning_layer_and_the_command_import_lightning():
    assert all(p.startswith(("lightning/", "cli/")) for p in users_of("lightning", "torchmetrics"))


def test_only_the_command_imports_hydra():
    assert all(path.startswith("cli/") for path in users_of("hydra", "omegaconf"))


@pytest.mark.parametrize(
    ("layer", "may_import"),
    [
        ("trees", ()),
        ("discovery", ()),
        ("silence", ()),
        ("isolation", ("discovery", "silence")),
        ("linearization", ("engines", "pytrees", "trees")),
        ("engines", ("likelihoods", "trees")),
        ("solvers", ("trees",)),
        ("curvature", ("operators", "options", "pytrees", "trees", "solvers")),
        (
            "nested",
            (
                "engines",
                "linearization",
                "operators",
                "options",
                "products",
                "pytrees",
                "solvers",
                "trees",
            ),
        ),
        ("closure", ("trees", "engines", "isolation", "likelihoods", "linearization")),
        (
            "optim",
            (
                "closure",
                "engines",
                "likelihoods",
                "linearization",
                "options",
                "preconditioners",
                "solvers",
                "trees",
            ),
        ),
        ("preconditioners", ("closure", "engines", "likelihoods", "options", "trees")),
        ("minimization", ("engines", "products", "pytrees", "solvers", "trees")),
        ("likelihoods", ()),
        ("options", ()),
        ("products", ("engines", "likelihoods", "linearization", "pytrees", "trees")),
        ("jacobians", ("engines", "products", "pytrees", "trees")),
        ("dual", ("engines", "isolation", "trees")),
        (
            "operators",
            (
                "closure",
                "engines",
                "isolation",
                "likelihoods",
                "linearization",
                "products",
                "pytrees",
                "trees",
            ),
        ),
        (
            "lightning",
            (
                "closure",
                "curvature",
                "engines",
                "isolation",
                "linearization",
                "nested",
                "operators",
                "optim",
                "options",
                "pytrees",
                "silence",
                "solvers",
                "trees",
            ),
        ),
        ("cli", ()),
    ],
)
def test_imports_go_downwards(layer, may_import):
    room = PACKAGE / layer
    files = room.rglob("*.py") if room.is_dir() else [room.with_suffix(".py")]
    for path in files:
        for module in imports(path):
            top, _, rest = module.partition(".")
            if top == "hvpopt":
                assert rest.partition(".")[0] in (layer, *may_import), f"{path} imports {module}"


def test_importing_hvpopt_imports_neither_lightning_nor_hydra():
    code = "import sys, hvpopt; print({'lightning', 'hydra', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_file_outgrows_a_room():
    sizes = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {str(p): n for p, n in sizes.items() if n > 275} == {}


def test_no_test_file_outgrows_a_room():
    sizes = {p: len(p.read_text().splitlines()) for p in Path(__file__).parent.rglob("*.py")}
    assert {str(p): n for p, n in sizes.items() if n > 300} == {}

"""The rooms of the house: imports point one way, the loop knows no task, files stay short."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cnx2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import besides itself, from the top of the house to the bottom.
BOTTOM = {"errors", "files"}
MAY_IMPORT = {
    "cli": {"commandline", "compilation_cache", "errors"},  # it loads a command by name
    "commands": {
        *("tasks", "launch", "preflight", "evaluation", "train", "interop", "checkpoints", "data", "models"),
        *("cluster", "observe", "configuration", "bands", "commandline", "workdir", "types", *BOTTOM),
    },
    "preflight": {"tasks", "train", "observe", "configuration", "errors"},
    "launch": {"sweeps", "observe", "configuration", "commandline", *BOTTOM},
    "tasks": {
        *("evaluation", "train", "checkpoints", "data", "models", "observe", "configuration"),
        *("bands", "types", *BOTTOM),
    },
    "evaluation": {"train", "data", "models", "cluster", "observe", "types", *BOTTOM},
    "train": {"checkpoints", "models", "cluster", "observe", "workdir", "configuration", "types", *BOTTOM},
    "interop": {"data", "models", "kernels", *BOTTOM},
    "checkpoints": {"models", "observe", *BOTTOM},
    "data": {"cluster", "configuration", "bands", "types", *BOTTOM},
    "models": {"kernels", "errors"},
    "observe": {"cluster", "types", *BOTTOM},
    "cluster": {*BOTTOM},
    "kernels": set(),
    "recipes": {"errors"},
    "sweeps": {"errors"},
    "workdir": {"configuration", *BOTTOM},
    "configuration": {"bands", "errors"},
    "bands": {*BOTTOM},
    "commandline": {"errors"},
    "files": {"storage", "errors"},
    "storage": {"errors"},
    "types": set(),
    "compilation_cache": set(),
    "errors": set(),
    "__init__": set(),
}


def room(path):
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def package_imports(path):
    """The rooms of cnx2_jax that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they go"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package in ("configs", "experiments", "tests"):
                yield package
            elif package == "cnx2_jax":
                yield rest[0]


def test_every_file_is_seen():
    assert {room(path) for path in FILES} == MAY_IMPORT.keys()
    assert {"errors", "models"} <= set(package_imports(PACKAGE / "tasks" / "base.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = room(path)
    assert set(package_imports(path)) - {here} <= MAY_IMPORT[here]


def test_no_import_comes_back_to_where_it_started():
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_no_room_may_import_what_it_does_not_need():
    needed = {here: set() for here in MAY_IMPORT}
    for path in FILES:
        needed[room(path)] |= set(package_imports(path)) - {room(path)}
    assert needed == MAY_IMPORT


@pytest.mark.parametrize("folder", ["kernels", "models"])
def test_models_know_neither_configs_nor_data(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                roots = {name.split(".")[0] for name in names}
                assert not roots & {"ml_collections", "tensorflow", "optax", "orbax", "absl"}, path


@pytest.mark.parametrize(
    ("folder", "others"),
    [("configs", {"configs", "experiments", "tests"}), ("experiments", {"configs", "tests"})],
)
def test_experiments_and_configs_use_the_package_not_each_other(folder, others):
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        assert not set(package_imports(path)) & others, path


def test_nothing_changes_where_python_looks_for_modules():
    pattern = re.compile(r"sys\.path(\.(append|insert|extend)\(|\[[^]]*\] *=| *\+?=)")
    assert pattern.search("sys.path.append(") and pattern.search("sys.path[:0] = []")
    for folder in ("cnx2_jax", "configs", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path


def test_the_loop_knows_no_task_by_name():
    for path in (PACKAGE / "train").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        }
        for node in ast.walk(tree):
            if id(node) in documentation:
                continue
            words = [
                value
                for value in (getattr(node, field, None) for field in ("id", "attr", "name", "arg", "value"))
                if isinstance(value, str)
            ]
            for word in words:
                # `cluster_detection_method` is JAX's, about who started a process.
                pattern = "pretrain|classif|fcmae|convnext|reconstruct|accuracy|segment|detect(?!ion_method)"
                assert not re.search(pattern, word, re.IGNORECASE), (path, word)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400

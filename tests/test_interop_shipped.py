"""What travels to a server can be run there: plain functions that need nothing which a server lacks."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import pytest

from moe_lens.interop.nnsight import shipped

MODULES = [
    import_module(f"{shipped.__name__}.{module.name}") for module in pkgutil.iter_modules(shipped.__path__)
]
# What a server of nnsight's has, and the two that only annotations need: those of signatures are not run there.
THERE = ("torch", "einops", "math", "typing", "__future__", shipped.__name__)


def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_imports_are_there(module: ModuleType) -> None:
    """Functions of torch, einops and math, and other shipped ones; nothing else of this package."""
    for node in ast.walk(tree_of(module)):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            assert any(name == root or name.startswith(f"{root}.") for root in THERE), name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_functions_are_plain(module: ModuleType) -> None:
    """No class, no decorator, no `self`; and no annotation inside of a function, whose names would be looked for
    where it runs."""
    for node in ast.walk(tree_of(module)):
        assert not isinstance(node, ast.ClassDef), node.name
        if isinstance(node, ast.FunctionDef):
            assert not node.decorator_list, node.name
            assert all(argument.arg != "self" for argument in node.args.args), node.name
            for inner in ast.walk(node):
                assert not isinstance(inner, ast.AnnAssign | ast.Import | ast.ImportFrom), node.name
                if isinstance(inner, ast.FunctionDef) and inner is not node:
                    annotated = [inner.returns, *(argument.annotation for argument in inner.args.args)]
                    assert not any(annotated), f"{node.name}.{inner.name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_autocast_is_off_only_in_computations(module: ModuleType) -> None:
    """No value is waited for while autocast is off: the model would make it without autocast too."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.With) and any("autocast" in ast.unparse(item) for item in node.items):
            waits = [
                inner
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute) and inner.attr in ("output", "input", "inputs", "skip")
            ]
            assert not waits, f"{module.__name__}, line {node.lineno}"


def globals_read(function: FunctionType) -> dict[str, Any]:
    """What a function reads of its module."""
    names = inspect.getclosurevars(function)
    return {**names.globals, **names.nonlocals}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_globals_are_plain(module: ModuleType) -> None:
    """What travels along: modules and functions of these packages, and plain constants."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ != module.__name__:
            continue
        for used, value in globals_read(function).items():
            if isinstance(value, ModuleType):
                assert value.__name__.partition(".")[0] in ("torch", "einops", "math"), f"{name} reads {used}"
            elif callable(value):
                home = value.__module__
                assert any(home.startswith(root) for root in THERE), f"{name} reads {used} of {home}"
            else:
                assert type(value) in (int, float, str, tuple, list, set, frozenset, dict), (
                    f"{name} reads {used}"
                )

"""Every setting of a method and of a small part is read by the module that declares it."""

import ast
import importlib
import inspect
import pathlib

import pytest

from fedjaxprune import registry


def _names_read(module) -> set[str]:
    """List the attributes that a module, and the private modules beside it, read."""
    path = pathlib.Path(inspect.getfile(module))
    beside = path.parent.glob("_*.py") if path.name != "__init__.py" else path.parent.glob("*.py")
    found = set()
    for file in {path, *beside}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_method_reads_every_setting(name):
    settings = registry.find("method", name).part.settings
    read = _names_read(importlib.import_module(settings.__module__))
    assert set(settings.model_fields) <= read


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_variant_sets_what_there_is(name):
    method = registry.find("method", name).part
    for variant, changes in method.variants.items():
        own = {path for path in changes if "." not in path}
        assert own <= set(method.settings.model_fields), variant

"""Write down what is public: `python -m tests.write_api` renews `tests/api.txt`.

Public is what `__all__` of the package and of its namespaces lists; of a module that is listed
there, its `__all__` or else what it defines without a leading underscore.
"""

import ast
import inspect
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import fedjaxprune

FILE = pathlib.Path(__file__).with_name("api.txt")
TOP = "fedjaxprune"


def lines() -> list[str]:
    """List every public name with its signature."""
    return list(_lines(fedjaxprune, TOP))


def _lines(place: types.ModuleType, path: str) -> Iterator[str]:
    for name in sorted(_public(place)):
        value, here = getattr(place, name), f"{path}.{name}"
        if isinstance(value, types.ModuleType):
            yield here
            yield from _lines(value, here)
        else:
            yield here + _signature(value)


def _public(place: types.ModuleType) -> set[str]:
    if hasattr(place, "__all__"):
        return set(place.__all__)
    assert place.__file__
    names = set()
    for node in ast.parse(pathlib.Path(place.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def _signature(value: Any) -> str:
    is_ours = isinstance(value, type) and value.__module__.startswith(TOP)
    if not inspect.isfunction(value) and not (is_ours and not issubclass(value, Exception)):
        return ""
    parameters = []
    for parameter in inspect.signature(value).parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty and re.search(r" at 0x|<", repr(default)):
            parameter = parameter.replace(default=getattr(default, "__name__", "..."))
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
    return str(inspect.Signature(parameters))


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")

"""Print the oldest version that pyproject.toml allows of each package, as constraints for pip."""

import pathlib
import re
import sys
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
LATEST = ("docs", "lint", "fuzz", "torch")  # extras that are used with their newest versions alone


def constraints(project: dict[str, Any]) -> list[str]:
    """Turn each lower bound ``name>=1.2`` of a project's requirements into ``name==1.2``."""
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"]]
    for extra in extras:
        listed += [] if extra in LATEST else extras[extra]
    pins = {}
    for requirement in listed:
        if requirement.startswith(project["name"]):
            continue  # an extra that includes others
        bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement)
        if not bound:
            raise ValueError(f"{requirement!r} has no single lower bound, as in 'numpy>=2.0'.")
        name, version = bound.groups()
        if pins.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lower bounds, {pins[name]} and {version}.")
    return [f"{name}=={version}" for name, version in pins.items()]


def read() -> list[str]:
    """Read the constraints from ``pyproject.toml``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return constraints(tomllib.loads(text)["project"])


if __name__ == "__main__":
    sys.stdout.write("\n".join(read()) + "\n")

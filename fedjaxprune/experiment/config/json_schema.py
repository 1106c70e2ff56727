"""The JSON schema of configurations, for editors that complete and check YAML files."""

from typing import Any

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config.sections import PLACES, SCHEMA, RunConfig, Uplink
from fedjaxprune.settings import Settings, nested


def schema() -> dict[str, Any]:
    """Make the schema; imports the built-in parts. Foreign parts may have any settings."""
    whole = _section(RunConfig, "")
    whole["properties"] = {"schema": {"const": SCHEMA}, **whole["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of fedjaxprune",
        **whole,
    }


def _section(kind: type[Settings], prefix: str) -> dict[str, Any]:
    made = kind.model_json_schema()
    properties = {}
    for name, field in kind.model_fields.items():
        path = prefix + name
        if path in PLACES:
            properties[name] = {"description": field.description, **_part(path)}
        elif inner := nested(field.annotation):
            properties[name] = _section(inner, f"{path}.")
        else:
            properties[name] = _plain(made["properties"][name])
    return {
        "type": "object",
        "description": (kind.__doc__ or "").partition("\n")[0],
        "properties": properties,
        "additionalProperties": False,
    }


def _part(path: str) -> dict[str, Any]:
    """Allow a bare name, or the name and settings of each built-in part, or any foreign part."""
    kind = PLACES[path].kind
    names = registry.names(kind)
    every = [*names, *(f"{one}/{v}" for one, listed in names.items() for v in listed.variants)]
    options: list[dict[str, Any]] = [
        {"type": "string", "examples": every},
        {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": ":|/|[.]py$"}},
            "required": ["name"],
        },
    ]
    for name, listed in names.items():
        try:
            settings = registry.find(kind, name).part.settings
        except ConfigError:  # not importable here
            continue
        made = settings.model_json_schema().get("properties", {})
        if path == "uplink":
            made |= Uplink.model_json_schema()["properties"]
        allowed = [name, *(f"{name}/{variant}" for variant in listed.variants)]
        options.append(
            {
                "type": "object",
                "description": listed.summary,
                "properties": {
                    "name": {"enum": allowed},
                    **{one: _plain(value) for one, value in made.items()},
                },
                "additionalProperties": False,
            }
        )
    return {"anyOf": options}


def _plain(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name not in ("unit", "unset", "kind")}

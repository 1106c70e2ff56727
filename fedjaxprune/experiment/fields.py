"""How a setting of the config is described; imports neither JAX nor anything that does."""

from typing import Any

from pydantic import Field


def field(
    default: Any, description: str, *, group: str, unit: str = "", default_text: str = "", **limits
) -> Any:
    """Describe one setting; `unit`, `group` and `default_text` are for the help.

    A function as `default` makes it from the settings that stand before this one.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(
        **given,
        description=description,
        json_schema_extra={"group": group, "unit": unit, "default": default_text},
        **limits,
    )

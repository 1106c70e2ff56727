"""YAML as configurations need it: the numbers of YAML 1.2, and nothing that a stranger may abuse.

``010`` is ten, ``1e-3`` a number, and ``1:30``, ``no`` and ``off`` are texts, unlike in YAML 1.1.
Anchors, aliases and tags are refused, as is a key that comes twice, depth, and half of a surrogate
pair.
"""

import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

LARGEST = 2**18  # bytes of a file
_DEEPEST = 32  # lists and mappings in each other
_DIGITS = 30  # of a whole number

_PREFIX = "tag:yaml.org,2002:"
_KINDS = {  # of YAML 1.2: pattern, and the characters that it may begin with
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class _Loader(yaml.SafeLoader):
    """YAML's safe reader, with less that it takes."""

    yaml_implicit_resolvers: ClassVar[Any] = {}  # a dict of its own, filled below
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read a value, unless it is an alias, has an anchor or tag, or lies too deep."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConstructorError(
                None, None, "anchors and aliases (& and *) are not read", event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise ConstructorError(None, None, "tags (!) are not read", event.start_mark)
        if self.depth > _DEEPEST:
            raise ConstructorError(
                None, None, "lists and mappings lie too deep in each other", event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, unless a key comes twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"{key.value!r} is set twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe writer; it quotes texts that either version of YAML reads as something else."""

    yaml_implicit_resolvers: ClassVar[Any] = {
        first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _integer(loader: yaml.SafeLoader, node: Any) -> int:
    digits = loader.construct_scalar(node)
    if len(digits) > _DIGITS:
        raise ConstructorError(
            None, None, f"a whole number has more than {_DIGITS} digits", node.start_mark
        )
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(digits, base)


def _number(loader: yaml.SafeLoader, node: Any) -> float:
    return float(
        loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


def _text(loader: yaml.SafeLoader, node: Any) -> str:
    text = loader.construct_scalar(node)
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ConstructorError(None, None, "a text has half of a surrogate pair", node.start_mark)
    return text


for _name, (_pattern, _first) in _KINDS.items():
    for _one in (_Loader, _Dumper):
        _one.add_implicit_resolver(_PREFIX + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))
for _name, _build in {"int": _integer, "float": _number, "str": _text}.items():
    _Loader.add_constructor(_PREFIX + _name, _build)


def read(text: str) -> Any:
    """Read one document; what yaml raises says what is wrong with it."""
    return yaml.load(text, _Loader)  # as safe as SafeLoader, of which it is one


def write(values: Any) -> str:
    """Write values so that both versions of YAML read them alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)

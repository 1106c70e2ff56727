"""Parts of every kind that build nothing, so that tests of the configuration train nothing."""

from fedjaxprune import registry

_FOLDERS = {"method": "methods", "model": "models"}


def use(monkeypatch) -> None:
    """Put these parts in the place of the built-in ones."""
    for kind, one in registry.KINDS.items():
        place = (
            f"tests.stub_parts.{kind}s" if kind in _FOLDERS else f"tests.stub_parts.others.{kind}"
        )
        monkeypatch.setitem(registry.KINDS, kind, one._replace(place=place))

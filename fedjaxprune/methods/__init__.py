"""Methods: one file, one paper."""

import pkgutil

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__, modules=" ".join(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_")
)

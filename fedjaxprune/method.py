"""A method that describes itself: what the value ``METHOD`` of a method's module says."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjaxprune.types import Algorithm


class Paper(NamedTuple):
    """Where a method was published.

    Attributes:
      authors: for example ``"Long et al."``.
      year: of the paper.
      title: of the paper, or the method's name in it.
      arxiv: identifier such as ``"2309.06805"``; empty if there is none.
      code: address of the authors' public code; empty if there is none.
    """

    authors: str
    year: int
    title: str
    arxiv: str = ""
    code: str = ""


class Needs(NamedTuple):
    """What a method needs of the network and the data, as facts that any network can have.

    Attributes:
      batch_norm: running statistics of batch normalization in the model state.
      convolutions: at least one convolution kernel.
      gates: layers that choose their channels for every example (`models.gates`).
      products: kernels that meet what comes of the examples in products which can be followed
        (`structure.moments`).
      server_examples: examples that the server holds.
    """

    batch_norm: bool = False
    convolutions: bool = False
    gates: bool = False
    products: bool = False
    server_examples: bool = False


class Method(NamedTuple):
    """A federated pruning method that describes itself: the value ``METHOD`` of its module.

    Attributes:
      build: ``(settings, task) -> Algorithm``; `task` is a `rounds.task.Task`.
      settings: the type of its settings (`settings.Settings`).
      paper: where it was published; None for a control.
      needs: of the network and the data, or ``settings -> needs`` where they depend on settings;
        ask by `needs_of`.
      default_model: name of the network that a run takes if none is given.
      variants: by name, settings of the method (``{"max_penalty": 0.0}``) or, by full path, of
        other sections (``{"client.correction": "scaffold"}``).
      law_settings: settings, by name or full path, under which a test of six clients and six rounds
        makes sense (`testing.laws_of`).
      nothing_pruned: settings on top of these under which nothing is pruned and training is
        FedAvg to the bit; None if there are none.
    """

    build: Callable[[Any, Any], Algorithm]
    settings: type[Any]
    paper: Paper | None = None
    needs: Needs | Callable[[Any], Needs] = Needs()
    default_model: str = "mlp"
    variants: Mapping[str, Mapping[str, Any]] = {}  # never changed
    law_settings: Mapping[str, Any] = {}
    nothing_pruned: Mapping[str, Any] | None = None


def needs_of(method: Method, settings: Any) -> Needs:
    """Say what a method needs under these settings of it."""
    return method.needs(settings) if callable(method.needs) else method.needs

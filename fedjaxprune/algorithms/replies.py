"""What the ledger has to know of a client's message, beside what its delta takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.accounts import SentAs

# Fields of a message that are charged in their own way, or, as metrics, not at all: what a run
# reports to its reader is no part of the method.
SPECIAL = ("delta", "masks", "metrics")


def describe(
    fields: Mapping[str, Any], codes: Mapping[str, SentAs], reports: Sequence[str]
) -> dict[str, Any]:
    """Note of a client's message what the ledger has to know.

    Args:
      fields: of the message.
      codes: how fields travel, where it is not ``"whole"``.
      reports: fields that do not travel.

    Returns:
      ``slots``, which fields travel at all; ``like``, those that travel whole, without their
      values; ``pairs``, the numbers of pairs; ``masks``, what personal masks keep.
    """
    others = {name: tree for name, tree in fields.items() if name not in (*SPECIAL, *reports)}
    told = {
        "slots": {
            name: jnp.bool_(True) if name == "model_state" else trees.any_nonzero(tree)
            for name, tree in others.items()
        },
        "like": trees.blank({n: t for n, t in others.items() if codes.get(n, "whole") == "whole"}),
        "pairs": {
            name: masks_lib.num_kept(jax.tree.map(lambda leaf: leaf != 0, tree))
            for name, tree in others.items()
            if codes.get(name) == "pairs"
        },
    }
    if "masks" in fields:
        told["masks"] = masks_lib.num_kept(fields["masks"])
    return told

"""What a client's message was, told in counts: noted at the client, read for the ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.traffic import FieldLength, SentAs
from fedjaxprune.types import Masks

# Fields of a message that are charged in their own way, or, as metrics, not at all: what a run
# reports to its reader is no part of the method.
SPECIAL = ("delta", "masks", "metrics")
_SHAPED: tuple[SentAs, ...] = ("whole", "bits")  # that are told by their own shapes


def summarize_message(
    fields: Mapping[str, Any],
    codes: Mapping[str, SentAs],
    reports: Sequence[str],
    narrowed: Mapping[str, Masks],
) -> dict[str, Any]:
    """Note of a client's message what the ledger has to know.

    Args:
      fields: of the message.
      codes: how fields travel, where it is not ``"whole"``.
      reports: fields that do not travel.
      narrowed: of fields that travel in part, masks of it that the receiver knows.
    """
    others = {name: tree for name, tree in fields.items() if name not in (*SPECIAL, *reports)}

    def of(*kinds: SentAs) -> dict[str, Any]:
        return {n: tree for n, tree in others.items() if codes.get(n, "whole") in kinds}

    told = {
        "slots": {
            name: jnp.bool_(True) if name == "model_state" else _says_anything(tree)
            for name, tree in others.items()
        },
        "like": trees.shape_only(of(*_SHAPED)),
        "pairs": {
            name: masks_lib.num_kept(jax.tree.map(_is_set, tree))
            for name, tree in of("pairs", "bits").items()
        },
        "known": {name: masks_lib.num_kept(masks) for name, masks in narrowed.items()},
    }
    if "masks" in fields:
        told["masks"] = masks_lib.num_kept(fields["masks"])
    return told


def to_fields(
    told: Mapping[str, Any],
    codes: Mapping[str, SentAs],
    *,
    trained: jax.Array,
    pruned: jax.Array,
) -> dict[str, FieldLength]:
    """Say for each field that a cohort's clients sent beside their deltas what of it travelled.

    Args:
      told: what `summarize_message` noted, gathered ``[C, ...]``.
      codes: as for `summarize_message`.
      trained: ``[L]`` int32, entries of the parameters that clients trained.
      pruned: ``[L]`` int32, the others.
    """
    fields = {}
    for name, slots in told["slots"].items():
        code = codes.get(name, "whole")
        like = jax.tree.map(lambda leaf: leaf[0], told["like"][name]) if code in _SHAPED else ()
        known: Any = {"live": trained, "pairs": pruned}.get(code, ())
        fields[name] = FieldLength(
            like=like,
            slots=slots,
            known=told["known"].get(name, known),
            pairs=told["pairs"].get(name, ()),
        )
    return fields


def _says_anything(tree: Any) -> jax.Array:
    """Tell whether any entry of a tree is set."""
    leaves = [jnp.any(_is_set(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.any(jnp.stack(leaves)) if leaves else jnp.bool_(False)


def _is_set(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.dtype == jnp.bool_ else leaf != 0

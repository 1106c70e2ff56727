"""The model card of an exported network: what it is, what made it, what it costs and may do."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.exporting import restore
from fedjaxprune.experiment.folder import record
from fedjaxprune.structure.compaction import compact

# What the makers of a data set say; for all others the card tells to look it up.
LICENCES = {
    "digits": "CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository)",
    "fashion_mnist": "MIT (Zalando SE)",
    "cifar10": "none stated by its makers (Krizhevsky, 2009); they ask to be cited",
    "cifar100": "none stated by its makers (Krizhevsky, 2009); they ask to be cited",
}
_BITS_PER_MIB = 8 * 2**20


class Difference(NamedTuple):
    """How far the exported network is from the run's on test examples.

    Attributes:
      relative: largest difference, as a fraction of the largest output.
      num_changed: examples that it puts into another class.
    """

    relative: float
    num_changed: int


class Facts(NamedTuple):
    """What a card says.

    Attributes:
      config: of the run.
      summary: of the record, up to the checkpoint; None where no round is on record.
      num_rounds: played, and planned.
      tested_round: after which the accuracy was measured, or None.
      num_weights: entries of the parameters: of the whole network, and of the exported one.
      num_live: those of the exported one that are not pruned.
      sparsity: pruned fraction of the prunable weights of the whole network.
      changes: leaves that became smaller.
      remainders: pruned filters that had to stay.
      is_constant: whether the network gives the same outputs for all inputs.
      sizes: bytes of the files by name, and ``dense`` of the whole network in float32.
      difference: on test examples.
      num_checked: how many of them.
      image_shape: of an example as stored.
      dtype: of it.
    """

    config: RunConfig
    summary: Mapping[str, Any] | None
    num_rounds: tuple[int, int]
    tested_round: int | None
    num_weights: tuple[int, int]
    num_live: int
    sparsity: float
    changes: tuple[compact.Change, ...]
    remainders: tuple[compact.Remainder, ...]
    is_constant: bool
    sizes: Mapping[str, int]
    difference: Difference
    num_checked: int
    image_shape: tuple[int, ...]
    dtype: str


def collect(
    found: restore.Finished,
    small: compact.Compacted,
    sizes: Mapping[str, int],
    difference: Difference,
    num_checked: int,
) -> Facts:
    """Gather what the card says."""
    parts, lines = found.parts, found.lines
    tested = [line.round for line in lines if line.test_accuracy is not None]
    whole = [leaf.nbytes for leaf in jax.tree.leaves((found.params, found.state))]
    return Facts(
        config=found.config,
        summary=record.summarize(lines) if lines else None,
        num_rounds=(found.num_rounds, sum(s.num_rounds for s in parts.algorithm.stages)),
        tested_round=tested[-1] if tested else None,
        num_weights=(sum(trees.sizes(found.params)), sum(trees.sizes(small.params))),
        num_live=int(np.sum(masks_lib.num_kept(small.masks))),
        sparsity=float(masks_lib.sparsity(found.masks, parts.prunable)),
        changes=small.changes,
        remainders=small.remainders,
        is_constant=small.is_constant,
        sizes={**sizes, "dense": sum(whole)},
        difference=difference,
        num_checked=num_checked,
        image_shape=tuple(parts.test.inputs.shape[1:]),
        dtype=str(parts.test.inputs.dtype),
    )


def licence(dataset: str) -> str:
    """Say under which licence a data set is."""
    base = dataset.partition(":")[0].partition("/")[0]
    return LICENCES.get(base, f"not known to this package: see the page of {base!r} at TFDS")


def write(facts: Facts) -> str:
    """Write the card."""
    config = facts.config
    sections = [
        _front(facts),
        f"# {config.model}, pruned by {config.algorithm} on {config.dataset}\n",
        _what(facts),
        _use(facts),
        _training(facts),
        _compaction(facts),
        _files(facts),
        "## Limits\n\nA product of a simulation for research: clients, partition and drop-outs are "
        "simulated in one process. Nothing was measured beyond the test set named above.\n",
    ]
    return "\n".join(sections)


def _front(facts: Facts) -> str:
    """Write the part that model hubs read."""
    lines = {
        "library_name": "jax",
        "pipeline_tag": "image-classification",
        "tags": ["federated-learning", "pruning", "sparsity", "stablehlo"],
        "datasets": [facts.config.dataset],
    }
    return "---\n" + "".join(f"{name}: {json.dumps(v)}\n" for name, v in lines.items()) + "---\n"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _what(facts: Facts) -> str:
    config, summary = facts.config, facts.summary or {}
    tested = facts.tested_round
    accuracy = _percent(summary.get("test_accuracy"))
    if tested is not None and tested != facts.num_rounds[0]:
        accuracy += f" (after round {tested})"
    played, planned = facts.num_rounds
    before, after = facts.num_weights
    rows = {
        "data": config.dataset,
        "licence of the data": licence(config.dataset),
        "method": config.algorithm,
        "rounds": f"{played} of {planned}",
        "test accuracy, by the run's record": accuracy,
        "sparsity of the prunable weights": _percent(facts.sparsity),
        "parameters": f"{before:,} in the run, {after:,} here, of which {facts.num_live:,} live",
    }
    return _table(rows)


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows.items())


def _use(facts: Facts) -> str:
    shape = ", ".join(map(str, facts.image_shape))
    return f"""## Use

The program takes images as the data set stores them, `{facts.dtype} [batch, {shape}]`, for any
batch, normalizes them itself and gives logits `float32 [batch, classes]`. It needs `jax`, and
`flatbuffers`, which `jax.export` reads its files with, and no other package:

```python
import pathlib
from jax import export

program = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
logits = program.call(images)
```

With fedjaxprune, weights and masks too:

```python
from fedjaxprune.experiment import export

net = export.load(".")  # net.predict(images), net.params, net.masks, net.state
```
"""


def _training(facts: Facts) -> str:
    summary = facts.summary
    text = (
        "## Training\n\nMade by `fedjaxprune run config.yaml` with the settings of `config.yaml`.\n"
    )
    if summary is None:
        return text
    rows = {
        "clients": f"{facts.config.num_clients}, {facts.config.cohort_size} a round",
        "partition": facts.config.partition,
        "sent up, measured": f"{summary['uplink_bits'] / _BITS_PER_MIB:,.2f} MiB",
        "sent down, measured": f"{summary['downlink_bits'] / _BITS_PER_MIB:,.2f} MiB",
    }
    if flops := summary.get("modeled_flops"):
        rows["FLOPs of training under masks, modeled"] = (
            f"{sum(v for name, v in flops.items() if not name.startswith('dense_')):.3g}"
        )
    return text + "\n" + _table(rows)


def _compaction(facts: Facts) -> str:
    difference = facts.difference
    text = "## Compaction\n\n"
    if facts.is_constant:
        text += "**The masks cut this network off from its inputs: its outputs never change.**\n\n"
    if not facts.changes:
        text += "No channel is dead everywhere it appears: the network is left as it is.\n"
    else:
        text += "Dead channels are removed, and what they contributed is a constant:\n\n"
        text += "| parameter | shape in the run | shape here |\n|---|---|---|\n"
        text += "".join(
            f"| `{c.path}` | {_shape(c.before)} | {_shape(c.after)} |\n" for c in facts.changes
        )
    if facts.remainders:
        text += "\nPruned filters that had to stay:\n\n"
        text += "".join(
            f"- {', '.join(f'`{path}` ({count})' for path, count in counts.items())}: {why}\n"
            for why, counts in by_reason(facts.remainders).items()
        )
    return text + (
        f"\nOn {facts.num_checked} test examples its outputs are those of the run's network\n"
        f"up to {difference.relative:.1e} of the largest; {difference.num_changed} examples "
        "change their class.\n"
    )


def by_reason(remainders: Iterable[compact.Remainder]) -> dict[str, dict[str, int]]:
    """Count the filters that stay by reason, and under each by the leaf that makes them."""
    counts: dict[str, dict[str, int]] = {}
    for each in remainders:
        of_leaves = counts.setdefault(each.why, {})
        of_leaves[each.path] = of_leaves.get(each.path, 0) + len(each.indices)
    return counts


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _files(facts: Facts) -> str:
    sizes = facts.sizes
    made_with = ", ".join(f"{name} {version}" for name, version in record.versions().items())
    rows = "".join(f"| `{name}` | {sizes[name]:,} |\n" for name in sizes if name != "dense")
    return (
        "## Files\n\n| file | bytes |\n|---|---|\n"
        + rows
        + f"| the run's parameters and state, uncompressed | {sizes['dense']:,} |\n\n"
        "`model.safetensors` holds every parameter under its path. One that is pruned is stored\n"
        "by its live values (`PATH.values`) and a mask of bits (`PATH.mask`, as `numpy.packbits`\n"
        "writes them); its shape is in the metadata.\n\n"
        f"Exported with {made_with}.\n"
    )

"""The model card of an exported network: what it is, what made it, what it costs and may do."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.experiment.exporting import restore
from fedjaxprune.experiment.folder import layout, summary
from fedjaxprune.experiment.folder.record import value
from fedjaxprune.structure.compaction import compact
from fedjaxprune.traffic import BITS_PER_MIB

# What the makers of a data set say; for all others the card tells to look it up.
LICENCES = {
    "digits": "CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository)",
    "fashion_mnist": "MIT (Zalando SE)",
    "cifar10": "none stated by its makers (Krizhevsky, 2009); they ask to be cited",
    "cifar100": "none stated by its makers (Krizhevsky, 2009); they ask to be cited",
}


class Difference(NamedTuple):
    """How far the exported network is from the run's on random inputs.

    Attributes:
      relative: largest difference, as a fraction of the largest output.
      num_changed: inputs whose largest output is another one.
    """

    relative: float
    num_changed: int


class Facts(NamedTuple):
    """What a card says.

    Attributes:
      config: of the run, nested.
      command: that makes such a run.
      task: what the labels are.
      summary: of the record, up to the checkpoint; None where no round is on record.
      num_rounds: completed, and planned.
      tested_round: after which the accuracy was measured, or None.
      num_weights: entries of the parameters: of the whole network, and of the exported one.
      num_live: those of the exported one that are not pruned.
      sparsity: pruned fraction of the prunable weights of the whole network.
      changes: leaves that became smaller.
      remainders: pruned filters that had to stay.
      is_constant: whether the network gives the same outputs for all inputs.
      sizes: bytes of the files by name, and ``dense`` of the whole network in float32.
      difference: on random inputs.
      num_checked: how many of them.
      input_shape: of an example as stored.
      dtype: of it.
    """

    config: Mapping[str, Any]
    command: str
    task: str
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
    input_shape: tuple[int, ...]
    dtype: str


def collect(
    found: restore.Finished,
    small: compact.Compacted,
    sizes: Mapping[str, int],
    difference: Difference,
    num_checked: int,
) -> Facts:
    """Gather what the card says."""
    header, lines, _ = found.found
    tested = [line["round"] for line in lines if line["test"]]
    whole = [leaf.nbytes for leaf in jax.tree.leaves((found.params, found.state))]
    prunable = set(found.network.prunable)
    planned = sum(stage["num_rounds"] for stage in header["stages"])
    return Facts(
        config=found.config,
        command=found.command,
        task=found.network.task,
        summary=summary.summarize(header, lines) if lines else None,
        num_rounds=(found.num_rounds, planned),
        tested_round=tested[-1] if tested else None,
        num_weights=(sum(trees.sizes(found.params)), sum(trees.sizes(small.params))),
        num_live=int(np.sum(masks_lib.num_kept(small.masks))),
        sparsity=float(masks_lib.sparsity(found.masks, lambda path, leaf: path in prunable)),
        changes=small.changes,
        remainders=small.remainders,
        is_constant=small.is_constant,
        sizes={**sizes, "dense": sum(whole)},
        difference=difference,
        num_checked=num_checked,
        input_shape=found.network.input_shape,
        dtype=found.network.input_dtype,
    )


def licence(dataset: str) -> str:
    """Say under which licence a data set is."""
    base = dataset.partition(":")[0].partition("/")[0]
    return LICENCES.get(base, f"not known to this package: see the page of {base!r} at TFDS")


def write(facts: Facts) -> str:
    """Write the card."""
    model, method, data = _names(facts)
    sections = [
        _front(facts),
        f"# {model}, pruned by {method} on {data}\n",
        _what(facts),
        _use(facts),
        _training(facts),
        _compaction(facts),
        _files(facts),
        "## Limits\n\nA product of a simulation for research: clients, partition and drop-outs are "
        "simulated in one process. Nothing was measured beyond the test set named above.\n",
    ]
    return "\n".join(sections)


def _names(facts: Facts) -> tuple[str, str, str]:
    """Name network, method and data."""
    config = facts.config
    return config["model"]["name"], config["method"]["name"], config["data"]["dataset"]["name"]


def _front(facts: Facts) -> str:
    """Write the part that model hubs read."""
    lines = {
        "library_name": "jax",
        "pipeline_tag": _pipeline(facts),
        "tags": ["federated-learning", "pruning", "sparsity", "stablehlo"],
        "datasets": [_names(facts)[2]],
    }
    return "---\n" + "".join(f"{name}: {json.dumps(v)}\n" for name, v in lines.items()) + "---\n"


def _pipeline(facts: Facts) -> str:
    """Name the task as model hubs do."""
    if facts.task == "sequence":
        return "text-generation"
    kind = "regression" if facts.task == "regression" else "classification"
    return f"{'image' if len(facts.input_shape) == 3 else 'tabular'}-{kind}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _what(facts: Facts) -> str:
    _, method, data = _names(facts)
    summary, tested = facts.summary or {}, facts.tested_round
    score, accuracy = "accuracy", _percent(value(summary, "test.accuracy"))
    if facts.task == "regression":
        score, accuracy = "loss", f"{value(summary, 'test.loss'):.4g}" if tested else "not measured"
    if tested is not None and tested != facts.num_rounds[0]:
        accuracy += f" (after round {tested})"
    completed, planned = facts.num_rounds
    before, after = facts.num_weights
    rows = {
        "data": data,
        "licence of the data": licence(data),
        "method": method,
        "rounds": f"{completed} of {planned}",
        f"test {score}, by the run's record": accuracy,
        "sparsity of the prunable weights": _percent(facts.sparsity),
        "parameters": f"{before:,} in the run, {after:,} here, of which {facts.num_live:,} live",
    }
    return _table(rows)


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows.items())


def _use(facts: Facts) -> str:
    shape = ", ".join(map(str, facts.input_shape))
    return f"""## Use

The program takes examples as the data set stores them, `{facts.dtype} [batch, {shape}]`, for any
batch, normalizes them itself and gives outputs `float32 [batch, outputs]`. It needs `jax`, and
`flatbuffers`, which `jax.export` reads its files with, and no other package:

```python
import pathlib
from jax import export

program = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
outputs = program.call(inputs)
```

With fedjaxprune, weights and masks too:

```python
from fedjaxprune.experiment.exporting import export

net = export.read(".")  # net.predict(inputs), net.params, net.masks, net.state
```
"""


def _training(facts: Facts) -> str:
    summary, config = facts.summary, facts.config
    text = "## Training\n\nMade with the settings of `config.yaml`:\n\n"
    text += f"```bash\n{facts.command}\n```\n"
    if summary is None:
        return text
    rows = {
        "clients": f"{value(config, 'data.num_clients')}, "
        f"{value(config, 'federation.cohort_size')} a round",
        "partition": value(config, "data.partition.name"),
        "sent up, measured": f"{value(summary, 'traffic.up.total_bits') / BITS_PER_MIB:,.2f} MiB",
        "sent down, measured": f"{value(summary, 'traffic.down.total_bits') / BITS_PER_MIB:,.2f} "
        "MiB",
    }
    if flops := value(summary, "compute.training_flops"):
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
        f"\nOn {facts.num_checked} random inputs its outputs are those of the run's network\n"
        f"up to {difference.relative:.1e} of the largest; the largest output is another one for "
        f"{difference.num_changed} of them.\n"
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
    made_with = ", ".join(f"{name} {version}" for name, version in layout.versions().items())
    rows = "".join(f"| `{name}` | {sizes[name]:,} |\n" for name in sizes if name != "dense")
    return (
        "## Files\n\n| file | bytes |\n|---|---|\n"
        + rows
        + f"| the run's parameters and state, uncompressed | {sizes['dense']:,} |\n\n"
        "`model.safetensors` holds every parameter under its path. One that is pruned is stored\n"
        "by its live values (`PATH.values`) and a mask of bits (`PATH.mask`, as `numpy.packbits`\n"
        "writes them); its shape is in the metadata. `constants/PATH` is what removed channels\n"
        "contribute to the output of the layer with the parameter PATH.\n\n"
        f"Exported with {made_with}.\n"
    )

"""The model card of an exported network: what it is, what made it, what it costs and may do."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.experiment.exporting import restore
from fedjaxprune.experiment.folder import layout, summary
from fedjaxprune.experiment.folder.network import Network
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
    """How far the exported network is from the run's on random inputs."""

    relative: float  # largest difference, as a fraction of the largest output
    num_changed: int  # inputs whose largest output is another one
    num_checked: int  # inputs


class Facts(NamedTuple):
    """What a card says."""

    run: restore.Finished
    small: compact.Compacted  # the network that is exported
    summary: Mapping[str, Any]  # of the record, up to the checkpoint; empty if no round is on it
    num_rounds: tuple[int, int]  # completed, and planned
    num_weights: tuple[int, int]  # of the whole network, and of the exported one
    num_live: int  # those of the exported one that are not pruned
    sizes: Mapping[str, int]  # bytes of the files by name, and ``dense`` of the whole network
    difference: Difference


def collect(
    run: restore.Finished,
    small: compact.Compacted,
    sizes: Mapping[str, int],
    difference: Difference,
) -> Facts:
    """Gather what the card says."""
    header, lines, _ = run.record
    whole = jax.tree.leaves((run.arrays.params, run.arrays.state))
    planned = sum(stage["num_rounds"] for stage in header["stages"])
    return Facts(
        run=run,
        small=small,
        summary=summary.summarize(header, lines) if lines else {},
        num_rounds=(run.arrays.num_rounds, planned),
        num_weights=(sum(trees.sizes(run.arrays.params)), sum(trees.sizes(small.params))),
        num_live=int(np.sum(masks_lib.num_kept(small.masks))),
        sizes={**sizes, "dense": sum(leaf.nbytes for leaf in whole)},
        difference=difference,
    )


def licence(dataset: str) -> str:
    """Say under which licence a data set is."""
    base = dataset.partition(":")[0].partition("/")[0]
    return LICENCES.get(base, f"not known to this package: see the page of {base!r} at TFDS")


def write(facts: Facts) -> str:
    """Write the card."""
    parts = facts.run.stored.values
    model, method = parts["model"]["name"], parts["method"]["name"]
    data = parts["data"]["dataset"]["name"]
    front = {  # what model hubs read
        "library_name": "jax",
        "pipeline_tag": _pipeline(facts.run.network),
        "tags": ["federated-learning", "pruning", "sparsity", "stablehlo"],
        "datasets": [data],
    }
    sections = [
        "---\n" + "".join(f"{name}: {json.dumps(v)}\n" for name, v in front.items()) + "---\n",
        f"# {model}, pruned by {method} on {data}\n",
        _table(
            {"data": data, "licence of the data": licence(data), "method": method} | _results(facts)
        ),
        _use(facts.run.network),
        _training(facts),
        _compaction(facts.small, facts.difference),
        _files(facts.sizes),
        "## Limits\n\nA product of a simulation for research: clients, partition and drop-outs are "
        "simulated in one process. Nothing was measured beyond the test set named above.\n",
    ]
    return "\n".join(sections)


def _pipeline(network: Network) -> str:
    """Name the task as model hubs do."""
    if network.task == "sequence":
        return "text-generation"
    kind = "regression" if network.task == "regression" else "classification"
    return f"{'image' if len(network.input_shape) == 3 else 'tabular'}-{kind}"


def _results(facts: Facts) -> dict[str, str]:
    run, (completed, planned), (before, after) = facts.run, facts.num_rounds, facts.num_weights
    tested = [line["round"] for line in run.record.lines if line["test"]]
    score, text = "accuracy", "not measured"
    if run.network.task == "regression":
        score = "loss"
        text = f"{value(facts.summary, 'test.loss'):.4g}" if tested else text
    elif (accuracy := value(facts.summary, "test.accuracy")) is not None:
        text = f"{100 * accuracy:.2f} %"
    if tested and tested[-1] != completed:
        text += f" (after round {tested[-1]})"
    prunable = set(run.network.prunable)
    sparsity = float(masks_lib.sparsity(run.arrays.masks, lambda path, leaf: path in prunable))
    return {
        "rounds": f"{completed} of {planned}",
        f"test {score}, by the run's record": text,
        "sparsity of the prunable weights": f"{100 * sparsity:.2f} %",
        "parameters": f"{before:,} in the run, {after:,} here, of which {facts.num_live:,} live",
    }


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows.items())


def _use(network: Network) -> str:
    dtype, shape = network.input_dtype, ", ".join(map(str, network.input_shape))
    outputs = ", ".join(["batch", *map(str, network.positions), "outputs"])
    return f"""## Use

The program takes examples as the data set stores them, `{dtype} [batch, {shape}]`, for any
batch, normalizes them itself and gives outputs `float32 [{outputs}]`. It needs `jax`, and
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
{_names(network)}"""


def _names(network: Network) -> str:
    """Say what outputs, and tokens, stand for."""
    if not network.class_names:
        return ""
    what = "Tokens, in and out," if network.task == "sequence" else "Outputs"
    return f"\n{what} stand for, in order:\n\n```json\n{json.dumps(network.class_names)}\n```\n"


def _training(facts: Facts) -> str:
    summary, config = facts.summary, facts.run.stored.values
    text = "## Training\n\nMade with the settings of `config.yaml`:\n\n"
    text += f"```bash\n{facts.run.stored.command}\n```\n"
    if not summary:
        return text
    num_clients, size = config["data"]["num_clients"], config["federation"]["cohort_size"]
    rows = {
        "clients": f"{num_clients}, {size} a round",
        "partition": value(config, "data.partition.name"),
    }
    for way in ("up", "down"):
        sent = value(summary, f"traffic.{way}.total_bits") / BITS_PER_MIB
        rows[f"sent {way}, measured"] = f"{sent:,.2f} MiB"
    if flops := value(summary, "compute.training_flops"):
        under_masks = sum(v for name, v in flops.items() if not name.startswith("dense_"))
        rows["FLOPs of training under masks, modeled"] = f"{under_masks:.3g}"
    return text + "\n" + _table(rows)


def _compaction(small: compact.Compacted, difference: Difference) -> str:
    text = "## Compaction\n\n"
    if small.is_constant:
        text += "**The masks cut this network off from its inputs: its outputs never change.**\n\n"
    if not small.changes:
        text += "No channel is dead everywhere it appears: the network is left as it is.\n"
    else:
        text += "Dead channels are removed, and what they contributed is a constant:\n\n"
        text += "| parameter | shape in the run | shape here |\n|---|---|---|\n"
        text += "".join(
            f"| `{c.path}` | {_shape(c.before)} | {_shape(c.after)} |\n" for c in small.changes
        )
    if small.remainders:
        text += "\nPruned filters that had to stay:\n\n"
        text += "".join(
            f"- {', '.join(f'`{path}` ({count})' for path, count in counts.items())}: {why}\n"
            for why, counts in by_reason(small.remainders).items()
        )
    return text + (
        f"\nOn {difference.num_checked} random inputs its outputs are those of the run's network\n"
        f"up to {difference.relative:.1e} of the largest; the largest output is another one for "
        f"{difference.num_changed} of them.\n"
    )


def by_reason(remainders: Iterable[compact.Remainder]) -> Mapping[str, Mapping[str, int]]:
    """Count the filters that stay by reason, and under each by the leaf that makes them."""
    counts: dict[str, Counter[str]] = {}
    for each in remainders:
        counts.setdefault(each.why, Counter())[each.path] += len(each.indices)
    return counts


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _files(sizes: Mapping[str, int]) -> str:
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

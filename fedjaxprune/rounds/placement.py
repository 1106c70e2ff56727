"""Where the arrays of a simulation lie on a mesh whose devices share a copy of the model.

A rule places the parameters; masks, residuals and optimizers' states follow the parameters whose
shapes they have. All else, and everything on a mesh without the axis, is on every device.
"""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjaxprune import trees
from fedjaxprune.federated.cohort import MODEL_AXIS
from fedjaxprune.rounds.simulation import Simulation

SMALLEST = 2**14  # entries of a leaf that is worth sharing out

# (path of a parameter, its shape, devices that share it) -> its PartitionSpec
RuleFn = Callable[[str, tuple[int, ...], int], PartitionSpec]


def largest_axis(path: str, shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    """Share a leaf out along its largest axis that the devices divide; small leaves stay whole."""
    del path  # the same for all
    whole = [size if size % num_devices == 0 else 0 for size in shape]
    if math.prod(shape) < SMALLEST or not any(whole):
        return PartitionSpec()
    axis = max(range(len(shape)), key=lambda i: (whole[i], i))  # of equal ones the last: outputs
    return PartitionSpec(*(None,) * axis, MODEL_AXIS)


def of_simulation(now: Simulation, mesh: Mesh, *, rule: RuleFn = largest_axis) -> Simulation:
    """Place every array of a simulation: a tree of ``NamedSharding`` like it.

    Args:
      now: arrays, or their shapes.
      mesh: as `cohort.make_mesh` makes one.
      rule: places the parameters.

    Raises:
      ValueError: a spec of the rule does not fit the shape of its parameter.
    """
    number = mesh.shape.get(MODEL_AXIS, 1)
    specs: dict[tuple[str, tuple[int, ...]], PartitionSpec] = {}
    for path, leaf in trees.items(now.state.params):
        spec = rule(path, leaf.shape, number) if number > 1 else PartitionSpec()
        _check(spec, path, leaf.shape, mesh)
        specs[path, leaf.shape] = spec

    def place(tree: Any, *, num_leading: int) -> Any:
        def leaf_place(path, leaf):
            shape = leaf.shape[num_leading:]
            parts = path.split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            spec = next((specs[end, shape] for end in ends if (end, shape) in specs), None)
            whole = () if spec is None else ((None,) * num_leading + tuple(spec))
            return NamedSharding(mesh, PartitionSpec(*whole))

        return trees.map_with_path(leaf_place, tree)

    return Simulation(state=place(now.state, num_leading=0), rows=place(now.rows, num_leading=1))


def _check(spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """See that a spec names axes of the mesh and divides the shape."""
    fits = len(spec) <= len(shape)
    for size, names in zip(shape, spec, strict=False):
        each = names if isinstance(names, tuple) else (names,) if names else ()
        fits &= all(name in mesh.shape for name in each)
        fits = fits and size % math.prod(mesh.shape[name] for name in each) == 0
    if not fits:
        raise ValueError(
            f"the placement of {path!r} must divide its shape {shape} over axes of the mesh "
            f"({', '.join(f'{name}: {size}' for name, size in mesh.shape.items())}), got {spec}."
        )

"""What a method is built for: the network, the protocol, and what is known of network and data."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from fedjaxprune.federated import local_training, mask_revision, step_scales
from fedjaxprune.federated.penalties import PenaltyFn
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import protocol as protocol_lib
from fedjaxprune.rounds import server_work
from fedjaxprune.types import Batcher, Client, Model, WeightView


class BatchesFn(Protocol):
    """Make local steps out of a client's examples, beside those of the protocol.

    ``batches(epochs=1, examples="all", share=0.1, augment=True) -> Batcher``: passes over all
    examples, or one pass over the ``share`` of them that is held out for ``"validation"``, or over
    the others, for ``"training"``. The held-out examples are the same in every round.
    """

    def __call__(
        self,
        *,
        epochs: int = ...,
        examples: Literal["all", "validation", "training"] = ...,
        share: float = ...,
        augment: bool = ...,
    ) -> Batcher:
        """Make a batcher."""
        ...


class Task(NamedTuple):
    """What a method's `build` is given.

    Attributes:
      model: the network.
      protocol: what every method shares.
      facts: of the network.
      batches: local steps beside those of the protocol.
      num_clients: ``N``.
      largest_client: examples that the largest client holds.
      num_server_examples: those that the server holds, `Population.held`.
      num_epochs: passes over its examples that a client makes in a round; 1 where the protocol
        counts steps.
      penalties: terms that every method adds to the loss of a local step (FedProx's).
      cohort_size: clients that are asked in a round; 0 where that is not known.
      examples_per_round: examples that the largest client trains on in a round, each as often as it
        is seen; 0 where these are `num_epochs` passes over its own.
    """

    model: Model
    protocol: protocol_lib.Protocol
    facts: facts_lib.Facts
    batches: BatchesFn
    num_clients: int
    largest_client: int
    num_server_examples: int = 0
    num_epochs: int = 1
    penalties: tuple[PenaltyFn, ...] = ()
    cohort_size: int = 0
    examples_per_round: int = 0

    def local_client(
        self,
        *,
        batcher: Batcher | None = None,
        penalties: Sequence[PenaltyFn] = (),
        report_grads: Callable[[Any], Any] | None = None,
        report_steps: local_training.StepPredicate | None = None,
        post_step: local_training.PostStepFn | None = None,
        step_scale: step_scales.StepScale | None = None,
    ) -> Client:
        """Make a client that trains its live weights as the protocol says.

        Options are those of `local_training.local_sgd`; `batcher` replaces the protocol's, and
        `step_scale` its factor by round.
        """
        return local_training.local_sgd(
            self.model.loss,
            batcher=self.protocol.batcher if batcher is None else batcher,
            optimizer=self.protocol.optimizer,
            learning_rate_scale=step_scale or self.protocol.learning_rate_scale,
            penalties=(*self.penalties, *penalties),
            report_grads=report_grads,
            report_steps=report_steps,
            post_step=post_step,
        )

    def mask_revising_client(self, revision: mask_revision.MaskRevision) -> Client:
        """Make a client that revises its own masks inside a round."""
        return local_training.mask_revising_sgd(
            self.model.loss,
            batcher=self.protocol.batcher,
            optimizer=self.protocol.optimizer,
            revision=revision,
            learning_rate_scale=self.protocol.learning_rate_scale,
            penalties=self.penalties,
        )

    def dense_feedback_client(self, *, penalties: Sequence[PenaltyFn] = ()) -> Client:
        """Make a client that applies gradients at masked weights to the dense ones."""
        return local_training.dense_feedback_sgd(
            self.model.loss,
            batcher=self.protocol.batcher,
            optimizer=self.protocol.optimizer,
            learning_rate_scale=self.protocol.learning_rate_scale,
            penalties=(*self.penalties, *penalties),
        )

    def viewed_client(self, view: WeightView, *, penalties: Sequence[PenaltyFn] = ()) -> Client:
        """Make a client that sees its dense weights through a view, chosen anew inside a round."""
        return local_training.viewed_sgd(
            self.model.loss,
            batcher=self.protocol.batcher,
            optimizer=self.protocol.optimizer,
            view=view,
            learning_rate_scale=self.protocol.learning_rate_scale,
            penalties=(*self.penalties, *penalties),
        )

    def server_source(self) -> server_work.SourceFn:
        """Give the server's own examples.

        Raises:
          ValueError: the server holds none.
        """
        if self.num_server_examples == 0:
            raise ValueError(
                "the method needs examples at the server: set `server.data_fraction` (in Python: "
                "`Population.held`)."
            )
        return server_work.server_examples()


def make(model: Model, protocol: protocol_lib.Protocol, *, inputs: Any) -> Task:
    """Make a task of a network and a protocol alone, for methods that need nothing else.

    Give the other fields by ``_replace``, where a method asks for them.

    Args:
      model: the network.
      protocol: what every method shares.
      inputs: tree of shapes ``[2, ...]`` of two examples (`facts.float_inputs`).
    """

    def batches(**options):
        raise ValueError(
            f"the method needs local steps of its own ({options}): give the task its `batches`."
        )

    return Task(
        model=model,
        protocol=protocol,
        facts=facts_lib.of_model(model, inputs=inputs),
        batches=batches,
        num_clients=0,
        largest_client=0,
    )

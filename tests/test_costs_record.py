"""What a round costs, in the record: by hand, for a network and masks of known size."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, metrics, models, traffic, trees
from fedjaxprune.experiment.folder import client_ids, layout, record, summary
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.types import Model
from tests.folders import line

MODEL = models.mlp(input_shape=(4,), num_classes=2, hidden_sizes=(6,))
PARAMS, _ = jax.eval_shape(MODEL.init, jax.random.key(0))
SIZES = trees.sizes(PARAMS)  # biases and kernels in turn: 6, 24, 2, 12


def profile(model=MODEL, warn=print):
    return round_costs.profile(
        model,
        PARAMS,
        np.zeros((9, 4), np.uint8),
        preprocess=lambda key, x: x.astype(jnp.float32),
        prunable=masks.is_kernel,
        warn=warn,
    )


def a_round(kept, rows, present, num_examples, num_changed=0, trains=True, **reports):
    """Make what a round reports, as far as costs need it."""
    loss = metrics.Mean(total=jnp.float32(1.0), weight=jnp.float32(num_examples))
    models = np.array(kept)  # [C, T, L], or [L] for the same one to everybody
    made = types.SimpleNamespace(
        num_downloaded=models if models.ndim == 3 else np.tile(models, (len(present), 1, 1)),
        num_uploaded=np.array(rows),
        participated=np.array(present),
        num_changed=np.int32(num_changed),
        sent=types.SimpleNamespace(reports=reports, up={"reply": {"delta": ()}} if trains else {}),
        train={"loss": loss},
    )
    return made


def test_a_round_is_charged_for_its_examples_under_its_masks():
    kept = [6, 12, 2, 4]
    made = a_round(kept, [kept, kept, SIZES], [True, True, False], 50, num_changed=9)
    costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
    assert costs.training_flops == {
        "forward": 2 * 50 * (12 + 4),
        "input_gradient": 2 * 50 * 4,
        "weight_gradient": 2 * 50 * (12 + 4),
        "dense_forward": 2 * 50 * 36,
        "dense_input_gradient": 2 * 50 * 12,
        "dense_weight_gradient": 2 * 50 * 36,
    }
    assert costs.clients_per_weight == 2 * (12 + 4) / 36
    assert costs.unchanged_fraction == 1 - 9 / 36


def test_personal_masks_that_leave_less_are_cheaper():
    rows = [[6, 12, 2, 2], [6, 6, 2, 4]]
    made = a_round([6, 24, 2, 12], rows, [True, True], 10)
    costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
    assert costs.training_flops is not None
    assert costs.training_flops["forward"] == 2 * 10 * (9 + 3)
    assert costs.clients_per_weight == (14 + 10) / 36


def test_clients_that_train_and_send_no_delta_are_charged_for_training():
    kept = [6, 12, 2, 4]
    trained = np.array([kept, kept, SIZES])
    unsent = np.zeros((3, 1, 4))  # nor did they receive a model
    made = a_round(
        unsent, np.zeros((3, 4)), [True, True, False], 50, trains=False, trained=trained[:, None]
    )
    costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
    assert costs.training_flops is not None
    assert costs.training_flops["forward"] == 2 * 50 * (12 + 4)
    assert costs.clients_per_weight == 2 * (12 + 4) / 36


def test_models_that_are_only_looked_at_cost_their_forward_passes():
    candidates = [[6, 12, 2, 4], [6, 6, 2, 12]]
    unsent = np.zeros((2, 2, 4))  # a client that has the candidates already
    for name, backward in ((traffic.EVALUATED, 0), (traffic.BACKPROPAGATED, 1)):
        reports = {name: np.repeat([candidates], 2, axis=0)}
        made = a_round(unsent, np.zeros((2, 4)), [True, True], 100, trains=False)
        made.sent.reports = reports
        costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
        assert costs.training_flops == {  # each candidate sees 50 examples
            "forward": 2 * 50 * (12 + 4 + 6 + 12),
            "input_gradient": backward * 2 * 50 * (4 + 12),
            "weight_gradient": backward * 2 * 50 * (12 + 4 + 6 + 12),
            "dense_forward": 2 * 100 * 36,
            "dense_input_gradient": backward * 2 * 100 * 12,
            "dense_weight_gradient": backward * 2 * 100 * 36,
        }
        assert costs.clients_per_weight == 0.0  # nobody trained


def test_dense_weight_gradients_are_charged_where_and_when_they_are_taken():
    kept = [6, 12, 2, 4]
    for total, further in ((50.0, 12 * 50 + 8 * 50), ([0.0, 0.0, 20.0, 20.0], 8 * 20)):
        made = a_round(kept, [kept], [True], 50)
        dense = metrics.Mean(total=jnp.asarray(total), weight=jnp.float32(50.0))
        made.train[traffic.DENSE_GRADIENT] = dense
        costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
        assert costs.training_flops is not None
        assert costs.training_flops["weight_gradient"] == 2 * (50 * (12 + 4) + further)
        assert costs.training_flops["input_gradient"] == 2 * 50 * 4
        assert costs.training_flops["dense_weight_gradient"] == 2 * 50 * 36


def test_a_round_that_nobody_took_part_in_costs_nothing():
    made = a_round(SIZES, [SIZES], [False], 0)
    costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
    assert costs.training_flops is not None
    assert set(costs.training_flops.values()) == {0}
    assert costs.clients_per_weight == 0.0


def test_a_network_that_cannot_be_counted_is_told_of_and_left_out():
    def predict(params, state, inputs):
        def halve(x):
            return 0.5 * (x @ jnp.eye(4))

        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, halve, inputs)

    said = []
    found = profile(Model(init=MODEL.init, loss=MODEL.loss, predict=predict), said.append)
    assert len(said) == 1
    assert "while_trips" in said[0]
    made = a_round(SIZES, [SIZES], [True], 5)
    costs = round_costs.of_round(found, made)  # pyright: ignore[reportArgumentType]
    assert costs.training_flops is None
    lines = [with_costs(number, costs) for number in (1, 2)]
    assert summary.summarize({}, lines)["compute"]["training_flops"] is None


def with_costs(number, costs):
    """Make a line of the record with a round's costs."""
    named = costs._asdict()
    masks_too = {
        f"mask.{name}": named[name] for name in ("clients_per_weight", "unchanged_fraction")
    }
    return line(number, changes={"compute.training_flops": costs.training_flops, **masks_too})


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], ""),
        ([7], "7"),
        ([3, 4, 5, 6, 7, 17], "3 1x4 10"),
        ([0, 0, 5], "0x2 5"),
        ([10, 20, 30, 40], "10x4"),
        (list(range(1000)), "0 1x999"),
    ],
)
def test_ids_of_clients_are_the_distances_between_them(ids, text):
    assert client_ids.to_text(ids) == text
    assert client_ids.is_text(text)
    assert client_ids.of_text(text) == ids


@pytest.mark.parametrize("text", [None, [1], "a", "1 ", " 1", "1x", "1  2", "-1", "0 1x16777217"])
def test_other_text_is_no_ids(text):
    assert not client_ids.is_text(text)


def test_a_record_is_cut_without_writing_it_again(tmp_path):
    header = {"schema": layout.SCHEMA, "stages": []}
    record.begin(tmp_path, header)
    lines = [line(number) for number in (1, 2, 3)]
    for one in lines:
        record.append(tmp_path, one)
    path = tmp_path / layout.METRICS
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"round": 4, "sta')  # torn
    assert record.cut(tmp_path, header, 3) == lines
    assert path.read_bytes() == whole
    assert record.cut(tmp_path, header, 1) == lines[:1]
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    record.cut(tmp_path, {**header, "more": 1}, 1)  # another version's header
    assert record.read(tmp_path) == record.Record({**header, "more": 1}, lines[:1])


def test_a_summary_adds_up_over_rounds():
    kept = [6, 12, 2, 6]
    made = a_round(kept, [kept], [True], 10)
    costs = round_costs.of_round(profile(), made)  # pyright: ignore[reportArgumentType]
    found = summary.summarize({}, [with_costs(number, costs) for number in (1, 2, 3)])
    assert found["compute"]["training_flops"]["forward"] == 3 * 2 * 10 * 18
    assert found["mask"]["clients_per_weight"] == pytest.approx(1.5)
    assert found["mask"]["unchanged_fraction"] == 1.0

"""Laws of preprocessing: values, shapes, and randomness per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.data import datasets, transforms

KEY = jax.random.key(0)
IMAGES = jax.device_put(np.random.default_rng(0).integers(1, 256, (64, 9, 7, 3), np.uint8))


def test_scaling_maps_the_storage_to_the_unit_interval():
    inputs = jnp.array([[0, 4, 16]], jnp.uint8)
    outputs = transforms.scale(max_value=16)(KEY, inputs)
    assert outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, [[0.0, 0.25, 1.0]])
    assert transforms.scale()(KEY, jnp.array([255], jnp.uint8)) == 1.0


def test_normalizing_by_their_own_statistics_gives_mean_zero_and_deviation_one():
    scaled = transforms.scale()(KEY, IMAGES)
    mean, std = np.mean(scaled, axis=(0, 1, 2)), np.std(scaled, axis=(0, 1, 2))
    outputs = transforms.normalize(mean=mean.tolist(), std=std.tolist())(KEY, scaled)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(outputs, axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(outputs, axis=(0, 1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize(("mode", "pad_mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_a_crop_is_a_window_of_the_padded_image(mode, pad_mode):
    padding = 2
    outputs = jax.jit(transforms.random_crop(padding=padding, mode=mode))(KEY, IMAGES)
    assert outputs.shape == IMAGES.shape
    assert outputs.dtype == IMAGES.dtype
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(IMAGES, sides, mode=pad_mode)
    windows = np.stack(
        [padded[:, i : i + 9, j : j + 7] for i in range(5) for j in range(5)], axis=1
    )
    matches = (windows == np.asarray(outputs)[:, None]).all(axis=(2, 3, 4))
    assert (matches.sum(axis=1) == 1).all()
    assert matches.any(axis=0).sum() > 12  # examples have offsets of their own, all over the range


def test_crop_offsets_are_uniform():
    crop = transforms.random_crop(padding=1)
    image = jnp.arange(1, 10, dtype=jnp.uint8).reshape(1, 3, 3, 1)
    outputs = np.asarray(crop(KEY, jnp.broadcast_to(image, (9_000, 3, 3, 1))))
    _, counts = np.unique(outputs[:, 1, 1, 0], return_counts=True)  # the centre tells the offset
    assert counts.size == 9
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 8) < 5 * np.sqrt(16)


def test_half_of_the_images_are_flipped():
    inputs = np.concatenate([IMAGES] * 8)
    outputs = np.asarray(jax.jit(transforms.random_flip())(KEY, inputs))
    same = (outputs == inputs).all(axis=(1, 2, 3))
    mirrored = (outputs == inputs[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 256) < 5 * np.sqrt(512 / 4)


def test_a_chain_applies_its_steps_in_order_with_different_keys():
    def noise(key, inputs):
        return jnp.concatenate([inputs, jax.random.uniform(key, (1,))])

    outputs = transforms.chain(noise, noise, noise)(KEY, jnp.zeros(1))
    assert outputs.shape == (4,)
    assert len(np.unique(outputs)) == 4
    np.testing.assert_array_equal(transforms.chain()(KEY, IMAGES), IMAGES)
    first = transforms.chain(lambda _, x: x + 1, lambda _, x: x * 2)
    assert first(KEY, jnp.float32(1.0)) == 4.0


@pytest.mark.parametrize("channels", [1, 3])
def test_only_training_is_augmented(channels):
    dataset = datasets.Dataset(
        name="mock",
        train={},
        test={},
        num_classes=2,
        class_names=("a", "b"),
        task="classification",
        input_shape=(16, 16, channels),
        max_value=255.0,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        may_flip=channels > 1,
    )
    inputs = jax.random.bits(KEY, (8, 16, 16, channels), jnp.uint8)
    plain = (inputs.astype(jnp.float32) / 255 - 0.5) / 0.25
    train, test = map(jax.jit, transforms.for_dataset(dataset, augment=True))
    np.testing.assert_allclose(test(KEY, inputs), plain, rtol=1e-5, atol=1e-6)
    augmented = train(KEY, inputs)
    assert augmented.shape == plain.shape
    assert augmented.dtype == jnp.float32
    assert not np.allclose(augmented, plain)
    train, test = map(jax.jit, transforms.for_dataset(dataset, augment=False))
    np.testing.assert_array_equal(train(KEY, inputs), test(KEY, inputs))
    train, _ = transforms.for_dataset(dataset._replace(mean=None, std=None), augment=False)
    np.testing.assert_allclose(train(KEY, inputs), inputs.astype(jnp.float32) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: transforms.scale(max_value=0), "max_value must be a positive number, got 0"),
        (lambda: transforms.normalize(mean=[0.1], std=[0.2, 0.3]), "one number per channel"),
        (lambda: transforms.normalize(mean=[], std=[]), "one number per channel"),
        (lambda: transforms.normalize(mean=[0.1], std=[0.0]), "std must be positive"),
        (lambda: transforms.random_crop(padding=0), "at least 1 pixel, got 0"),
        (lambda: transforms.random_crop(padding=1, mode="wrap"), "got 'wrap'"),  # type: ignore
    ],
)
def test_senseless_options_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"statistics of 1 channels, but .* have 3"):
        transforms.normalize(mean=[0.1], std=[0.2])(KEY, IMAGES)
    for step in (transforms.random_crop(padding=1), transforms.random_flip()):
        with pytest.raises(ValueError, match=r"got shape \(9, 7, 3\)"):
            step(KEY, IMAGES[0])
    with pytest.raises(ValueError, match="got 7"):
        transforms.random_crop(padding=7, mode="reflect")(KEY, IMAGES)

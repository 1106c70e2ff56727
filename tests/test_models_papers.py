"""The papers' networks have the papers' numbers, to the unit."""

import functools

import jax
import jax.numpy as jnp
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import flops
from fedjaxprune.models import gated, lstm, vgg

KEY = jax.random.key(0)
CIFAR = {"input_shape": (32, 32, 3), "num_classes": 10}
CIFAR100 = {"input_shape": (32, 32, 3), "num_classes": 100}


class Network:
    """A network that is made when it is wanted, and equal to another of the same options."""

    def __init__(self, make, **options):
        self.make, self.options = make, options

    def __call__(self):
        return self.make(**self.options)

    def __eq__(self, other):
        return (self.make, self.options) == (other.make, other.options)

    def __hash__(self):
        return hash((self.make, repr(self.options)))


def is_conv(path, leaf):
    return masks.is_kernel(path, leaf) and leaf.ndim == 4


def is_norm(path, leaf):
    return path.endswith(("batch/scale", "batch/bias"))


def is_gate(path, leaf):
    return path.rsplit("/", 1)[-1].startswith("gate_")


def without_shortcuts(path, leaf):
    return masks.is_kernel(path, leaf) and not path.endswith("shortcut/kernel")


def everything(path, leaf):
    return True


# (paper, network, which leaves, how many entries)
COUNTS = [
    ("FedDIP", Network(models.lenet5, input_shape=(28, 28, 1), num_classes=10), everything, 61_706),
    (
        "FedDIP",
        Network(models.lenet5, input_shape=(28, 28, 1), num_classes=10),
        masks.is_kernel,
        61_470,
    ),
    ("FedDIP", Network(models.alexnet, **CIFAR), everything, 23_272_266),
    ("FedDIP", Network(models.alexnet, **CIFAR), masks.is_kernel, 23_262_912),
    ("FedDIP", Network(models.resnet18, norm="batch", **CIFAR100), everything, 11_220_132),
    ("FedDIP", Network(models.resnet18, norm="batch", **CIFAR100), without_shortcuts, 11_038_400),
    ("FedDIP", Network(models.resnet50, norm="batch", **CIFAR100), everything, 23_705_252),
    ("FedDIP", Network(models.resnet50, norm="batch", **CIFAR100), without_shortcuts, 20_883_136),
    ("FedTiny", Network(models.resnet18, norm="batch", **CIFAR), everything, 11_173_962),
    ("FedTiny", Network(models.resnet18, norm="batch", **CIFAR), masks.is_kernel, 11_164_352),
    ("FedTiny", Network(models.pooled_cnn, **CIFAR), everything, 104_810),
    ("FedTiny", Network(models.pooled_cnn, channels=(8, 16, 32), **CIFAR), everything, 72_986),
    ("FedTiny", Network(models.pooled_cnn, channels=(8, 16, 16), **CIFAR), everything, 37_898),
    (
        "FedTiny",
        Network(models.pooled_cnn, channels=(8, 8, 8), hidden_size=64, **CIFAR),
        everything,
        10_298,
    ),
    (  # torchvision's, but for 2,752 biases of convolutions, which the normalization cancels
        "FedTiny",
        Network(vgg.vgg11, norm="batch", hidden_sizes=(4096, 4096), pool=7, **CIFAR),
        everything,
        128_812_810 - 2_752,
    ),
    (
        "FedTiny",
        Network(vgg.vgg11, norm="batch", hidden_sizes=(4096, 4096), pool=7, **CIFAR),
        masks.is_kernel,
        9_217_728 + 4096 * (7 * 7 * 512 + 4096 + 10),
    ),
    (
        "MPFL",
        Network(vgg.vgg11, norm="none", hidden_sizes=(4096, 4096), pool=7, **CIFAR100),
        everything,
        129_176_036,
    ),
    ("MPFL", Network(vgg.vgg11, norm="none", **CIFAR100), is_conv, 9_217_728),
    ("MPFL", Network(vgg.vgg11, norm="batch", **CIFAR100), is_conv, 9_217_728),
    (
        "MPFL",
        Network(models.resnet18, norm="batch", stem="imagenet", **CIFAR100),
        is_conv,
        11_166_912,
    ),
    (
        "MPFL",
        Network(models.resnet34, norm="batch", stem="imagenet", **CIFAR100),
        is_conv,
        21_267_648,
    ),
    (
        "AutoFLIP",
        Network(models.two_cnn, input_shape=(24, 24, 1), num_classes=10),
        everything,
        1_663_370,
    ),
    (
        "AutoFLIP",
        Network(models.two_cnn, input_shape=(24, 24, 3), num_classes=10),
        everything,
        1_664_970,
    ),
    (
        "AutoFLIP",
        Network(models.two_cnn, input_shape=(24, 24, 3), num_classes=100, width=128),
        everything,
        7_303_524,
    ),
    (
        "AutoFLIP",
        Network(models.femnist_cnn, input_shape=(28, 28, 1), num_classes=62),
        everything,
        13_180_734,
    ),
    (  # 80 * 8 + 4 * 256 * (8 + 256 + 2) + 4 * 256 * (256 + 256 + 2) + 257 * 80
        "AutoFLIP",
        Network(lstm.char_lstm, input_shape=(80,), num_classes=80),
        everything,
        819_920,
    ),
    ("ADP", Network(gated.gated_resnet32, norm="batch", density=0.7, **CIFAR), is_gate, 52_320),
    ("ADP", Network(gated.gated_resnet32, norm="batch", density=0.7, **CIFAR), is_norm, 2_272),
    (
        "ADP",
        Network(gated.gated_resnet32, norm="batch", density=0.7, **CIFAR),
        masks.is_kernel,
        461_872,
    ),
    ("ADP", Network(models.resnet32, norm="batch", **CIFAR), masks.is_kernel, 461_872),
    ("ADP", Network(models.resnet20, norm="batch", **CIFAR), masks.is_kernel, 268_336),
    (  # gates see what the convolutions see, one tap of it: a ninth of the kernels, and the biases
        "ADP",
        Network(gated.gated_vgg16, norm="batch", density=0.7, **CIFAR),
        is_gate,
        14_710_464 // 9 + 4_224,
    ),
]

# Multiply-adds of the convolutions and dense layers for one 32×32 image, in millions.
MACS = [
    ("FedTiny", Network(models.resnet18, norm="batch", **CIFAR), 555.42),
    ("ADP", Network(models.resnet20, norm="batch", **CIFAR), 40.55),
    ("ADP", Network(models.resnet32, norm="batch", **CIFAR), 68.86),
]

# Convolution filters: what a mask of one bit a filter costs.
FILTERS = [
    (Network(vgg.vgg11, norm="none", **CIFAR100), 2_752),
    (Network(models.resnet18, norm="batch", stem="imagenet", **CIFAR100), 4_800),
    (Network(models.resnet34, norm="batch", stem="imagenet", **CIFAR100), 8_512),
]


@functools.cache
def shapes(make):
    return jax.eval_shape(make().init, KEY)


@pytest.mark.parametrize(
    ("make", "counted", "size"),
    [
        pytest.param(make, counted, size, id=f"{paper}-{counted.__name__}-{size}")
        for paper, make, counted, size in COUNTS
    ],
)
def test_a_network_has_as_many_parameters_as_its_paper_says(make, counted, size):
    params, _ = shapes(make)
    flags = masks.prunable_leaves(params, counted)
    assert sum(n for n, flag in zip(trees.sizes(params), flags, strict=True) if flag) == size


@pytest.mark.parametrize(("make", "millions"), [pytest.param(*case[1:]) for case in MACS])
def test_a_network_multiplies_as_often_as_its_paper_says(make, millions):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    counted = flops.dense(flops.of_model(make(), None, image)).forward
    assert round(counted / 1e6, 2) == millions


@pytest.mark.parametrize(("make", "filters"), FILTERS)
def test_a_network_has_as_many_filters_as_mpfl_counts(make, filters):
    params, _ = shapes(make)
    leaves = zip(trees.paths(params), jax.tree.leaves(params), strict=True)
    assert sum(leaf.shape[-1] for path, leaf in leaves if is_conv(path, leaf)) == filters


def test_mpfl_sends_a_bit_per_output_of_every_tensor_by_its_own_helper():
    plain = vgg.vgg11(norm="none", hidden_sizes=(4096, 4096), pool=7, **CIFAR100)
    residual = models.resnet18(norm="batch", stem="imagenet", **CIFAR100)
    for model, bits in ((plain, 22_088), (residual, 24_200)):
        leaves = jax.tree.leaves(jax.eval_shape(model.init, KEY))
        assert sum(leaf.shape[-1] for leaf in leaves) == bits

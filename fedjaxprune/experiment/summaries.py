"""What `fedjaxprune list` says of each method and network."""

from collections.abc import Mapping

from fedjaxprune.experiment import explore_recipes, filter_recipes, gated_recipes

SUMMARIES: Mapping[str, str] = {
    "fedavg": "federated averaging, dense (McMahan et al., arXiv 1602.05629)",
    "fedprox": "FedAvg with a proximal term (Li et al., arXiv 1812.06127)",
    "scaffold": "FedAvg with control variates (Karimireddy et al., arXiv 1910.06378)",
    "fednova": "FedAvg that averages per local step (Wang et al., arXiv 2007.07481)",
    "feddip": "extreme dynamic pruning with an incremental penalty (Long et al., arXiv 2309.06805)",
    "feddip_without_penalty": "FedDIP's ablation: pruning alone",
    "feddip_without_pruning": "FedDIP's ablation: penalty alone",
    "fedtiny": "sparse start chosen by BatchNorm statistics, then block-wise exchange "
    "(Huang et al., arXiv 2212.01977)",
    "random_masks": "control: FedAvg under random masks",
    "magnitude_masks": "control: one-shot magnitude masks after training at the server",
    "one_client_masks": "control: magnitude masks that one client's data decide",
    "pooled_masks": "control: magnitude masks that the data of all decide",
    "snip_masks": "control: connection sensitivity at the server (Lee et al., arXiv 1810.02340)",
    "snip_masks_of_clients": "control: connection sensitivity averaged over clients",
    "gradual_magnitude": "control: magnitude pruning along a cubic curve "
    "(Zhu and Gupta, arXiv 1710.01878)",
    **explore_recipes.SUMMARIES,
    **filter_recipes.SUMMARIES,
    "mlp": "two hidden layers; any input",
    "lenet5": "two convolutions, three dense layers",
    "cnn": "two 5x5 convolutions, 512 hidden units",
    "two_cnn": "two 5x5 convolutions averaged to 7x7, 512 hidden units (AutoFLIP)",
    "femnist_cnn": "the same, twice as wide, 2,048 hidden units and dropout (AutoFLIP)",
    "pooled_cnn": "three 3x3 convolutions, 128 hidden units (FedTiny's small dense network)",
    "alexnet": "CIFAR form, 23 million weights (FedDIP)",
    "vgg11": "8 convolutions without normalization, 9.2 million weights",
    "vgg11_bn": "8 convolutions with normalization, 9.2 million weights",
    "vgg16_bn": "13 convolutions with normalization, 14.7 million weights",
    "resnet8": "CIFAR form, 75 thousand weights",
    "resnet18": "CIFAR form, 11 million weights",
    "resnet20": "CIFAR form, 0.27 million weights",
    "resnet32": "CIFAR form, 0.46 million weights",
    "resnet34": "CIFAR form, 21 million weights",
    "resnet50": "CIFAR form, bottlenecks, 24 million weights",
    **gated_recipes.SUMMARIES,
    "char_lstm": "two LSTM layers of 256 over characters; sequences of tokens",
}

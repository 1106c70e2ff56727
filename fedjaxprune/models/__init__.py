"""Networks, and other libraries' networks as a `Model`."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules="activations adapters calls gates heads layers precision",
    names={
        "convolutional": "alexnet cnn emnist_cnn femnist_cnn lenet5 pooled_cnn two_cnn",
        "gated": "gated_resnet8 gated_resnet32 gated_vgg16",
        "lstm": "char_lstm",
        "outside": "as_model from_equinox",
        "adapters": "from_functions from_linen from_nnx",
        "mobilenet": "mobilenet_v2",
        "perceptron": "mlp",
        "resnet": "resnet8 resnet18 resnet20 resnet32 resnet34 resnet50",
        "shufflenet": "shufflenet_v2",
        "transformers": "gpt vit",
        "vgg": "vgg9 vgg11 vgg16",
        "wide": "wide_resnet",
    },
)

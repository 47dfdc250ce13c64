"""Networks that turn inputs into features; the learner adds the heads."""

from cl_bench.models.alexnet_cl import AlexNetCL
from cl_bench.models.cnn import SmallCNN
from cl_bench.models.dropout import Dropout
from cl_bench.models.efficientnet_lite import efficientnet_lite0
from cl_bench.models.encoder import Encoder, encoder
from cl_bench.models.gpt import gpt
from cl_bench.models.identity import Identity
from cl_bench.models.lenet import LeNet
from cl_bench.models.minilm import MiniLM, minilm
from cl_bench.models.mlp import MLP
from cl_bench.models.pretrained import pretrained
from cl_bench.models.resnet18_small import ResNet18Small
from cl_bench.models.t5 import t5
from cl_bench.models.vit import ViT

__all__ = [
    "MLP",
    "AlexNetCL",
    "Dropout",
    "Encoder",
    "Identity",
    "LeNet",
    "MiniLM",
    "ResNet18Small",
    "SmallCNN",
    "ViT",
    "efficientnet_lite0",
    "encoder",
    "gpt",
    "minilm",
    "pretrained",
    "t5",
]

"""Networks for images of 224 × 224 pixels, written after the tables of their papers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def alexnet(*, width: int = 64, size: int = 224, classes: int = 1000) -> nn.Module:
    """AlexNet of one column, 61 million parameters, without dropout.

    Five convolutions of 64, 192, 384, 256 and 256 channels and three linear layers, of 4096, 4096
    and ``classes`` units: Krizhevsky, Sutskever and Hinton (2012), section 3.5, in the widths of
    Krizhevsky (One weird trick, 2014), section 5.

    Args:
        width: Channels of the first convolution; the others are in proportion.
        size: Height and width of the images, at least 63.
        classes: Units of the last layer.
    """
    c1, c2, c3, c4 = width, 3 * width, 6 * width, 4 * width
    features = nn.Sequential(
        *(nn.Conv2d(3, c1, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c1, c2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c3, c4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c4, c4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        nn.Flatten(),
    )
    with torch.no_grad():
        num_features = features(torch.zeros(1, 3, size, size)).shape[1]
    units = 64 * width
    head = (nn.Linear(num_features, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())
    return nn.Sequential(features, *head, nn.Linear(units, classes))


def resnet18(*, width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-18, 11.7 million parameters, with BatchNorm in training mode.

    He, Zhang, Ren and Sun, Deep residual learning (2016), table 1.

    Args:
        width: Channels of the first stage; each later one has twice as many.
        classes: Units of the last layer.
    """
    layers: list[nn.Module] = [*_conv_norm(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(_Residual(channels, width * 2**stage, stride))
            channels = width * 2**stage
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(*layers, *pooled)


class _Residual(nn.Module):
    """Two 3×3 convolutions beside the identity, or a 1×1 convolution where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_norm(channels_in, channels, 3, stride),
            nn.ReLU(),
            *_conv_norm(channels, channels, 3, 1),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv_norm(channels_in, channels, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


def _conv_norm(channels_in: int, channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels)]

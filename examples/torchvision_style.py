"""Four image classifiers as torchvision writes them, certified as they are: ResNet-18, VGG-11, MobileNetV2 and a tiny ViT.

    python examples/torchvision_style.py

Nothing here is made for AutoDual: in-place activations, max pooling, fused attention, ``+=`` and batch norm are what people
write. The weights are random, and bounds by interval arithmetic get loose with depth, so what is shown is that every model
compiles, that its bounds hold at corners of the region, and what they cost beside a forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual

CLASSES = 10


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to what the convolutions say."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """Four stages of two blocks, each half as large and twice as wide as the one before."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(widths[i], widths[i + 1], 1 if i == 0 else 2), BasicBlock(widths[i + 1], widths[i + 1], 1)
                )
                for i in range(4)
            )
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


class Vgg11(nn.Module):
    """Eight convolutions in five groups, each ended by max pooling, and a classifier with dropout."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
            if isinstance(factor, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, factor * width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                channels = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(8 * width, 8 * width), nn.ReLU(True), nn.Dropout(),
            nn.Linear(8 * width, 8 * width), nn.ReLU(True), nn.Dropout(),
            nn.Linear(8 * width, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        return self.classifier(self.features(x).flatten(1))


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter every channel by itself, narrow again."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.conv = nn.Sequential(*layers)
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Add the input where the shape allows."""
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """A stack of inverted residuals: (expansion, channels, repeats, first stride) per line."""

    SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 2, 2), (6, 96, 1, 1))

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = max(4, int(32 * width))
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(True)]
        for expand, outputs, repeats, stride in self.SETTINGS:
            for index in range(repeats):
                wide = max(4, int(outputs * width))
                layers.append(InvertedResidual(channels, wide, stride if index == 0 else 1, expand))
                channels = wide
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class EncoderBlock(nn.Module):
    """Pre-norm attention and multilayer perceptron."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class VitTiny(nn.Module):
    """Patches of 8x8 pixels, a class token, learned positions."""

    def __init__(self, dim: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, 17, dim).normal_(std=0.02))
        self.encoder = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.ln, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        n = x.shape[0]
        x = self.conv_proj(x).reshape(n, -1, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.encoder(x))[:, 0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": ResNet18,
    "VGG-11": Vgg11,
    "MobileNetV2": MobileNetV2,
    "ViT-tiny": VitTiny,
}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: ResNet18(4),
    "VGG-11": lambda: Vgg11(4),
    "MobileNetV2": lambda: MobileNetV2(0.2),
    "ViT-tiny": lambda: VitTiny(12, 2, 3),
}
"""The same models, a fraction as wide, for quick tests."""


def image_model(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with seeded weights, in evaluation mode, that takes pixels in 0..1."""
    torch.manual_seed(0)
    normalize = autodual.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    return nn.Sequential(normalize, build()).eval().requires_grad_(False)


def main(models: dict[str, Callable[[], nn.Module]] = MODELS, eps: float = 1e-4) -> None:
    """Certify every model; bounds that a corner of the region leaves would stop the script."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    region = autodual.LInf(eps, domain=(0.0, 1.0))
    for name, build in models.items():
        model = image_model(build)
        start = time.perf_counter()
        net = autodual.certify(model)
        net.bounds(x, region, method="interval")  # traces, compiles and checks
        middle = time.perf_counter()
        bounds = net.bounds(x, region, method="interval")
        end = time.perf_counter()
        for corner in (x - eps, x + eps):
            if not bounds.contains(model(corner.clamp(0.0, 1.0)), 1e-5).all():
                raise SystemExit(f"{name}: a corner of the region is outside its bounds")
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{name:12} {count / 1e6:5.1f} M parameters, compiled in {middle - start:4.1f} s, bounds in {end - middle:5.2f} s, "
            f"width {bounds.width.median():.3g} at eps {eps:g}"
        )


if __name__ == "__main__":
    main()

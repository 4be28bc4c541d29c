"""Convolutional networks, each of a well-known kind, on images a few pixels wide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


@zoo("lenet", (1, 12, 12), unit=True, peer="2.2 (max pool)")
class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 2)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))


@zoo("lenet, as printed", (1, 8, 8), unit=True)
def classic_lenet() -> nn.Module:
    """Tanh and average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4)
    )


@zoo("alexnet-like", (2, 11, 11), unit=True)
class AlexNet(nn.Module):
    """Overlapping max pooling, adaptive average pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 4, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


@zoo("vgg-like", (2, 8, 8), unit=True)
class Vgg(nn.Module):
    def __init__(self, plan: tuple[int | str, ...] = (4, "M", 6, 6, "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 2
        for entry in plan:
            if entry == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                channels = entry
        self.features, self.head = nn.Sequential(*layers), nn.Linear(6 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(start_dim=1))


@zoo("all-convolutional", (1, 8, 8), unit=True)
def all_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(5, 5, 3, stride=2, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(5, 3, 1), nn.AvgPool2d(4), nn.Flatten(),
    )  # fmt: skip


@zoo("dilated", (1, 7, 7), unit=True)
class Dilated(nn.Module):
    """Growing dilation, reflected and replicated edges: a score for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.two = nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="replicate")
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.two(F.elu(self.one(x)))))


@zoo("grouped and shuffled", (4, 4, 4), unit=True)
class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle in between, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.head(F.relu(self.two(x)).mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """MobileNet's block: widen, filter each channel alone, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int = 2) -> None:
        super().__init__()
        hidden = inputs * widen
        self.use_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.use_shortcut:
            return x + self.conv(x)
        return self.conv(x)


@zoo("mobilenet-like", (3, 8, 8), unit=True)
def mobilenet() -> nn.Module:
    blocks = [InvertedResidual(4, 4, 1), InvertedResidual(4, 6, 2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU6(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole image says."""

    def __init__(self, channels: int, squeezed: int, gate: nn.Module) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(F.relu(self.fc1(self.avgpool(x)))))


@zoo("squeeze and excitation", (2, 5, 5), unit=True)
def squeeze_excitation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), SqueezeExcitation(6, 3, nn.Sigmoid()), nn.Flatten(), nn.Linear(54, 3))


@zoo("mobilenet v3 block", (2, 6, 6), unit=True)
def mobilenet_v3() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Hardswish(), SqueezeExcitation(6, 2, nn.Hardsigmoid()),
        nn.Conv2d(6, 4, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@zoo("inception", (2, 5, 5), unit=True)
class Inception(nn.Module):
    """Four branches side by side; one of them is a max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(2, 3, 1)
        self.branch3 = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(True), nn.Conv2d(2, 3, 3, padding=1))
        self.branch5 = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(True), nn.Conv2d(2, 2, 5, padding=2))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(2, 2, 1))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch3(x), self.branch5(x), self.pooled(x)]
        return self.head(F.relu(torch.cat(branches, 1)).mean([-2, -1]))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


@zoo("resnet, basic blocks", (2, 6, 6), unit=True)
def resnet() -> nn.Module:
    stem = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, BasicBlock(4, 4), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@zoo("resnet, max-pooled stem", (2, 8, 8), unit=True)
def resnet_stem() -> nn.Module:
    stem = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(3, stride=2, padding=1)]
    return nn.Sequential(*stem, BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@zoo("resnet, bottleneck", (4, 5, 5), unit=True)
class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.conv3, self.bn = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x), inplace=True)
        out = F.relu(self.conv2(out), inplace=True)
        out = F.relu(self.bn(self.conv3(out)) + x)
        return self.head(out.view(out.size(0), -1))


@zoo("pre-activation resnet", (3, 5, 5), unit=True)
class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)])
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(F.relu(norm(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norms[-1](x)), 1).squeeze(-1).squeeze(-1))


@zoo("densenet", (2, 6, 6), unit=True)
class DenseNet(nn.Module):
    def __init__(self, growth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(3):
            channels = 2 + index * growth
            self.layers.append(
                nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1, bias=False))
            )
        self.transition = nn.Sequential(nn.Conv2d(2 + 3 * growth, 4, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.head(self.transition(torch.cat(features, 1)).flatten(1))


@zoo("u-net, transposed convolution", (1, 8, 8), unit=True)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, kernel_size=2, stride=2)
        self.merge, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        deep = F.relu(self.down2(F.max_pool2d(skip, 2)))
        return torch.sigmoid(self.head(F.relu(self.merge(torch.cat([self.up(deep), skip], dim=1)))))


@zoo("u-net, interpolation", (1, 6, 6), unit=True)
class UNetInterpolated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.merge = nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.down1(x))
        deep = F.silu(self.down2(skip))
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return self.merge(torch.cat([skip, deep], dim=1))


@zoo("super-resolution", (2, 3, 3), unit=True)
class SuperResolution(nn.Module):
    """Pixel shuffle, added to the enlarged input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.shuffle = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.PixelShuffle(2)
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return self.enlarge(x) + self.shuffle(self.out(F.prelu(self.conv(x), torch.tensor([0.25], dtype=x.dtype))))


@zoo("convolution in 1-D", (2, 12))
def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3), nn.Tanh(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


@zoo("convolution in 3-D", (1, 4, 4, 4), unit=True)
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(24, 3)
    )


@zoo("global max pooling", (2, 5, 5), unit=True)
class GlobalMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        pooled = [F.adaptive_max_pool2d(x, 1).flatten(1), x.mean(dim=(2, 3))]
        return self.head(torch.cat(pooled, dim=1))


class ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm over channels behind a permute, two linear maps, a scaled shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act, self.gamma = nn.GELU(), nn.Parameter(0.3 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return shortcut + x.permute(0, 3, 1, 2)


@zoo("convnext-like", (2, 6, 6), unit=True)
def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 2, stride=2), ConvNextBlock(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3)
    )


@zoo("spatial attention", (2, 5, 5), unit=True)
class SpatialAttention(nn.Module):
    """A map from mean and maximum over channels gates every pixel, as in CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        average, largest = torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]
        x = x * torch.sigmoid(self.gate(torch.cat([average, largest], dim=1)))
        return self.head(x.mean(dim=(2, 3)))


@zoo("spatial pyramid", (1, 6, 6), unit=True)
class Pyramid(nn.Module):
    """Max pooling to several grids, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x), 0.2)
        return self.head(torch.cat([F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2)], dim=1))


@zoo("style statistics", (2, 4, 4), unit=True)
class Gram(nn.Module):
    """Products of every two channels, averaged over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.conv(x)).flatten(2)
        return self.head((features @ features.transpose(1, 2) / features.size(2)).flatten(1))


@zoo("local response normalisation", (4, 4, 4), unit=True)
def local_response() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(24, 3))

"""Recurrent networks, unrolled and as PyTorch's own modules, and convolutions over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo

STEPS = 3


@zoo("lstm cell, by hand", {"x": (4,), "h": (4,), "c": (4,)}, peer="1.10 (LSTM cell)")
class LstmCellByHand(nn.Module):
    """One step from input and state, all of which move."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        i, f, g, o = (self.inputs(x) + self.state(h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return self.head(torch.sigmoid(o) * torch.tanh(c))


@zoo("lstm cell loop", (STEPS, 3))
class LstmLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), 5)
        c = torch.zeros_like(h)
        for t in range(STEPS):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


@zoo("gru cell loop", (STEPS, 3))
class GruLoop(nn.Module):
    """Every state is kept and the outputs are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.shape[0], 5, dtype=x.dtype), []
        for t in range(STEPS):
            h = self.cell(x[:, t, :], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, dim=1)


@zoo("gru, by hand", (STEPS, 3))
class GruByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates, self.candidate, self.head = nn.Linear(8, 10), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0, :1].repeat(1, 5) * 0
        for x_t in x.unbind(dim=1)[:STEPS]:
            r, z = torch.sigmoid(self.gates(torch.cat([x_t, h], dim=1))).chunk(2, 1)
            n = torch.tanh(self.candidate(torch.cat([x_t, r * h], dim=1)))
            h = (1 - z) * n + z * h
        return self.head(h)


@zoo("elman network, by hand", (STEPS, 3), scale=1.5)
class Elman(nn.Module):
    """Loops over however many steps the input has."""

    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h, self.head = nn.Linear(3, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 6, device=x.device, dtype=x.dtype)
        for t in range(x.size(1)):
            h = torch.tanh(self.i2h(x[:, t]) + self.h2h(h))
        return self.head(h)


@zoo("rnn cell, relu", (STEPS, 3))
class RnnCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(3, 5, nonlinearity="relu"), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0])
        for t in range(1, STEPS):
            h = self.cell(x[:, t], h)
        return self.head(h)


@zoo("nn.LSTM, batch first", (STEPS, 3))
class TorchLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return self.head(outputs[:, -1])


@zoo("nn.LSTM, last state of two layers", (STEPS, 3))
class StackedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, num_layers=2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x.permute(1, 0, 2))
        return self.head(h[-1])


@zoo("nn.GRU, time first", (STEPS, 3))
class TorchGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.gru(x.transpose(0, 1))
        return self.head(outputs).transpose(0, 1)


@zoo("nn.GRU, both directions", (STEPS, 3))
class BidirectionalGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 3, batch_first=True, bidirectional=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0].mean(dim=1))


@zoo("nn.RNN, batch first", (STEPS, 3))
class TorchRnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.rnn(x)
        return self.head(h.squeeze(0))


@zoo("nn.RNN, relu, time first, given state", {"x": (STEPS, 3), "h": (5,)})
class GivenState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 5, nonlinearity="relu"), nn.Linear(5, 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        outputs, _ = self.rnn(x.transpose(0, 1), h.unsqueeze(0))
        return self.head(outputs[-1])


class TemporalBlock(nn.Module):
    """Causal dilated convolutions with a shortcut: padded on both sides, cut off on the right."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.cut = dilation
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 2, padding=dilation, dilation=dilation))
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)[:, :, : -self.cut].contiguous()
        return F.relu(F.relu(y) + self.shortcut(x))


@zoo("temporal convolutions", (2, 6))
class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(TemporalBlock(2, 4, 1), TemporalBlock(4, 4, 2)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


@zoo("wavenet-like", (2, 6))
class WaveNet(nn.Module):
    """tanh times sigmoid, residual and skip sums."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 2, 1)
        self.filters = nn.ModuleList([nn.Conv1d(3, 6, 2, dilation=d) for d in (1, 2)])
        self.skips = nn.ModuleList([nn.Conv1d(3, 3, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), 0
        for convolution, skip, dilation in zip(self.filters, self.skips, (1, 2), strict=True):
            signal, gate = convolution(F.pad(x, (dilation, 0))).chunk(2, dim=1)
            z = torch.tanh(signal) * torch.sigmoid(gate)
            total = total + skip(z)
            x = x + z
        return self.end(F.relu(total)).mean(-1)


@zoo("text convolutions, max over time", (5, 4))
class TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(4, 4, width) for width in (2, 3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1)
        pooled = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.head(torch.cat(pooled, dim=1))


@zoo("convolutional lstm step", {"x": (1, 4, 4), "h": (2, 4, 4), "c": (2, 4, 4)})
class ConvLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        i, f, o, g = torch.split(self.gates(torch.cat([x, h], dim=1)), 2, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh()


@zoo("state-space scan", (4, 2))
class StateSpace(nn.Module):
    """A linear recurrence whose decay depends on the input, then a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.inputs, self.gate = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = 0.0
        for t in range(4):
            a = torch.exp(-F.softplus(self.decay(x[:, t])))
            state = a * state + self.inputs(x[:, t])
        return self.head(state * F.silu(self.gate(x[:, -1])))


@zoo("exponential smoothing", (6,))
class Smoothing(nn.Module):
    """Holt's method with learned rates: affine in the series."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.3, -0.8]))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = torch.sigmoid(self.rates)
        level, trend = x[:, 0], x[:, 1] - x[:, 0]
        for t in range(1, 6):
            previous, level = level, alpha * x[:, t] + (1 - alpha) * (level + trend)
            trend = beta * (level - previous) + (1 - beta) * trend
        return torch.stack([level + k * trend for k in (1, 2, 3)], dim=-1)

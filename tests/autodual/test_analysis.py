"""Shares add up and agree with samples; an outline encloses every output."""

import pytest
import torch
from torch import nn

import autodual
from autodual.analysis import cut, outline, sign_shares


def network(outputs=2, inputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, outputs)).double()


def inside(polygon, points):
    following = torch.roll(polygon, -1, 0)
    edges, ways = following - polygon, points[:, None] - polygon[None]
    return ((edges[:, 0] * ways[..., 1] - edges[:, 1] * ways[..., 0]) >= -1e-9).all(1)


@pytest.mark.parametrize("region", [autodual.LInf(0.1), autodual.L2(0.3), autodual.L1(0.2)], ids=repr)
@pytest.mark.parametrize("method", ["interval", "dual", "adaptive"])
def test_an_outline_encloses_the_outputs(region, method):
    model, x = network(), torch.tensor([[0.2, -0.1], [1.0, 0.4]]).double()
    polygons = outline(autodual.certify(model), x, region, method)
    for i in range(2):
        points = torch.stack([region.sample(x[i : i + 1], torch.Generator().manual_seed(j))[0] for j in range(300)])
        assert inside(polygons[i], model(points).detach()).all()
        assert method == "interval" or not inside(polygons[i], model(x[1 - i : 2 - i]).detach()).any()


def test_an_outline_of_an_affine_model_is_exact():
    model = nn.Linear(2, 2).double()
    (polygon,) = outline(autodual.certify(model), torch.zeros(1, 2).double(), autodual.L2(1.0), directions=180)
    ahead = torch.roll(polygon, -1, 0)
    area = 0.5 * (polygon[:, 0] * ahead[:, 1] - polygon[:, 1] * ahead[:, 0]).sum()
    assert area.item() == pytest.approx(torch.pi * torch.linalg.det(model.weight).abs().item(), rel=1e-3)


def test_an_outline_needs_two_outputs_and_three_directions():
    net, x = autodual.certify(network(outputs=3)), torch.zeros(1, 2).double()
    with pytest.raises(autodual.SpecificationError, match="spec must have shape"):
        outline(net, x, autodual.LInf(0.1))
    with pytest.raises(autodual.SpecificationError, match="three directions"):
        outline(net, x, autodual.LInf(0.1), directions=2)


def test_shares_of_signs():
    model, x, region = network(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double(), autodual.LInf(0.2)
    shares = list(sign_shares(autodual.certify(model), x, region).values())
    assert len(shares) == 2
    assert all(torch.allclose(share.sum(1), torch.ones(4).double()) for share in shares)
    points = torch.stack([region.sample(x, torch.Generator().manual_seed(j)) for j in range(200)])
    with torch.no_grad():
        first = model[0](points)
        seen = [first, model[2](first.relu())]
    for share, values in zip(shares, seen, strict=True):
        switching = ((values > 0).any(0) & (values < 0).any(0)).double().mean(1)
        assert (share[:, 1] >= switching - 1e-12).all()
        assert (share[:, 0] <= (values <= 0).all(0).double().mean(1) + 1e-12).all()
    still = sign_shares(autodual.certify(model), x, autodual.LInf(0.0)).values()
    assert all((share[:, 1] == 0).all() for share in still)


def test_half_planes_without_a_common_point_leave_nothing():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double()
    assert cut(rows, torch.tensor([1.0, 1.0, 0.0]).double()).shape == (0, 2)

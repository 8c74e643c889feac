"""What every heatmap that is trained through must do; a new file in ``heatmaps`` is tested by being there."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from evidence_ft import heatmaps
from evidence_ft.alignments import outside_mass
from tests.conftest import build_encoder

HEATMAPS = [module.name for module in pkgutil.iter_modules(heatmaps.__path__)]


class AlignmentLoss(nn.Module):
    """Images to the summed alignment loss of their heatmaps, for a score that is not linear in the features."""

    def __init__(self, kind, name, layers):
        super().__init__()
        encoder = build_encoder(kind).double()
        size = encoder.preprocessing.size
        if kind == "timm":
            # Few tokens: each product of attention and gradient has a kink at 0, and none may be close.
            encoder.model.visual.trunk.set_input_size(img_size=48)
            size, encoder.image_tower.grid = (48, 48), (3, 3)
        generator = torch.Generator().manual_seed(0)
        self.tower, self.layers = encoder.image_tower, layers
        self.heatmap = importlib.import_module(f"evidence_ft.heatmaps.{name}").heatmap
        self.images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
        self.masks = (torch.rand(2, *self.tower.grid, generator=generator) > 0.5).double()
        self.text = F.normalize(torch.randn(10, generator=generator, dtype=torch.float64), dim=0)

    def score(self, features: Tensor) -> Tensor:
        return 10 * F.normalize(features, dim=-1) @ self.text

    def forward(self, images: Tensor) -> Tensor:
        heat = self.heatmap(self.tower.trace(images, self.layers), self.score, create_graph=True)
        # In percent, so that derivatives are far above the tolerance.
        return 100 * outside_mass.loss(heat, self.masks).sum()

    def along(self, steps: Tensor) -> Tensor:
        """The loss with every parameter moved in a random direction, each along with a few others by one step."""
        generator = torch.Generator().manual_seed(1)
        moved = {}
        for index, (name, start) in enumerate(self.named_parameters()):
            direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            length = start.detach().norm().item() or 1.0
            moved[name] = start.detach() + steps[index % len(steps)] * length * direction / direction.norm()
        return functional_call(self, moved, (self.images,))


@pytest.fixture(
    params=[(kind, name, layers) for kind in ("native", "timm") for name in HEATMAPS for layers in ("all", [-1], [1])],
    ids=lambda parameter: "-".join(map(str, parameter)),
)
def loss(request):
    return AlignmentLoss(*request.param)


def no_steps():
    return torch.zeros(8, dtype=torch.float64, requires_grad=True)


def test_the_gradient_of_a_loss_on_it_matches_finite_differences(loss):
    start = no_steps()
    assert torch.autograd.grad(loss.along(start), start)[0].abs().min() > 0.01  # far above the tolerance
    assert gradcheck(loss.along, (start,), atol=1e-6, rtol=1e-4)


def plain_layer_norm(x, _shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


@pytest.mark.slow
def test_the_gradient_of_that_gradient_matches_finite_differences(loss, monkeypatch):
    # Training needs second derivatives of the tower, this check third ones. Those of torch's layer norm are wrong (it
    # takes mean and deviation for constants there), and those of fused attention do not exist.
    monkeypatch.setattr(F, "layer_norm", plain_layer_norm)
    with sdpa_kernel(SDPBackend.MATH):
        assert gradgradcheck(loss.along, (no_steps(),), atol=1e-4, rtol=1e-4)

import torch

from evidence_ft.alignments import outside_mass
from tests import by_definition


def test_it_is_the_share_of_mass_outside(generator):
    heat = torch.rand(5, 4, 6, generator=generator)
    mask = torch.rand(5, 4, 6, generator=generator)
    expected = [1 - by_definition.rma(h, m) for h, m in zip(heat, mask, strict=True)]
    torch.testing.assert_close(outside_mass.loss(heat, mask), torch.tensor(expected))


def test_going_dark_costs_everything_and_no_annotation_costs_nothing():
    heat = torch.zeros(2, 2, 2)
    mask = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
    loss = outside_mass.loss(heat, mask)
    assert loss[0] == 1
    assert loss[1].isnan()


def test_descent_moves_mass_onto_the_evidence():
    raw = torch.zeros(1, 2, 2, requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    before = outside_mass.loss(raw.exp(), mask)
    before.sum().backward()
    after = outside_mass.loss((raw - raw.grad).exp(), mask)
    assert after < before

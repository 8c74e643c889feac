import pytest
import torch
from scipy.optimize import minimize

from evidence_ft.classifier import LinearHead
from evidence_ft.methods import lp_ft
from tests.methods.fitting import NAMES, accuracy, clusters


def penalised(weight, bias, features, labels, l2):
    """Regularised logistic regression, by its definition."""
    inputs = features.double() / features.double().norm(dim=1, keepdim=True)
    logits = inputs @ weight.T + bias
    surprise = torch.logsumexp(logits, dim=1) - logits[torch.arange(len(labels)), labels]
    return surprise.mean() + l2 / 2 * (weight**2).sum()


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_probe_is_the_minimum_that_scipy_finds(l2):
    features, labels = clusters()
    labels[::7] = (labels[::7] + 1) % 3  # not to be parted by a plane

    def value(flat):
        flat = torch.tensor(flat, requires_grad=True)
        loss = penalised(flat[:30].reshape(3, 10), flat[30:], features, labels, l2)
        loss.backward()
        return loss.item(), flat.grad.numpy()

    expected = minimize(value, [0.0] * 33, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    head = LinearHead(torch.ones(3, 10), torch.ones(3))
    lp_ft.fit_probe(head, features, labels, l2=l2, iterations=1000)
    torch.testing.assert_close(
        head.weight.detach(), torch.tensor(expected[:30]).reshape(3, 10).float(), atol=1e-4, rtol=1e-4
    )
    offsets = torch.tensor(expected[30:]).float()  # determined up to a constant: biases are not penalised
    torch.testing.assert_close(
        head.bias.detach() - head.bias.mean().detach(), offsets - offsets.mean(), atol=1e-4, rtol=1e-4
    )


def test_reading_the_training_set_fits_the_classifier(native_encoder):
    tuning = lp_ft.prepare(native_encoder, NAMES, lp_ft.Config())
    features, labels = clusters()
    assert accuracy(tuning, features, labels) < 0.9
    with torch.no_grad():
        tuning.read_training_set(features, labels)
    assert accuracy(tuning, features, labels) == 1


def test_the_probe_leaves_trained_parameters_in_place(native_encoder):
    tuning = lp_ft.prepare(native_encoder, NAMES, lp_ft.Config())
    before = [(id(parameter), parameter.requires_grad, parameter.dtype) for parameter in tuning.head.parameters()]
    tuning.read_training_set(*clusters())
    assert before == [
        (id(parameter), parameter.requires_grad, parameter.dtype) for parameter in tuning.head.parameters()
    ]
    assert all(parameter.grad is None for parameter in tuning.head.parameters())


def test_few_iterations_keep_the_probe_near_its_start(native_encoder):
    features, labels = clusters()
    distances = []
    for iterations in (1, 1000):
        tuning = lp_ft.prepare(native_encoder, NAMES, lp_ft.Config(probe_iterations=iterations))
        start = tuning.head.weight.detach().clone()
        tuning.read_training_set(features, labels)
        distances.append((tuning.head.weight - start).norm().item())
    assert distances[0] < distances[1]

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rdfkern.models.loss import Objective, class_weights, combine_released
from rdfkern.models.outputs import Outputs
from rdfkern.models.released import released_loss

WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


def outputs(rows, seed=0):
    torch.manual_seed(seed)
    heads = [torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return Outputs(heads[0], {"text": heads[1], "audio": heads[2]}), heads


def plain(found, labels, weights):
    def mean(head):
        return F.cross_entropy(head, labels, weights, ignore_index=-1)

    others = [mean(head) for head in found.per_modality.values()]
    return mean(found.fused) + 0.4 * sum(others) / 2


@pytest.mark.parametrize("weights", [None, WEIGHTS.double()])
@pytest.mark.parametrize("combine", [None, combine_released])
def test_shares_of_a_batch_have_the_gradients_of_the_whole(weights, combine):
    labels = torch.tensor([0, 1, -1, 2, 1, 0, -1])
    objective = Objective(0.4, weights, combine)
    whole, heads = outputs(7)
    if combine is None:
        loss = plain(whole, labels, weights)
    else:
        loss = released_loss(whole, labels, weights)
    truth = torch.autograd.grad(loss, heads)
    count = objective.count(labels.numpy())

    cuts = [slice(0, 3), slice(3, 3), slice(3, 7)]  # the second process gets nothing
    parts = [
        Outputs(whole.fused[cut], {n: head[cut] for n, head in whole.per_modality.items()})
        for cut in cuts
    ]
    sums = [objective.sums(part, labels[cut]) for part, cut in zip(parts, cuts, strict=True)]
    total = sum(part.detach() for part in sums)
    found = [objective.shared(part, count, lambda value: value.copy_(total)) for part in sums]
    for _, value in found:
        assert value.item() == pytest.approx(loss.item(), rel=1e-12)
    gradients = torch.autograd.grad(sum(part for part, _ in found), heads)
    for actual, expected in zip(gradients, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_batch_without_labels_has_zero_gradients():
    objective = Objective(0.4)
    found, heads = outputs(2)
    labels = torch.tensor([-1, -1])
    surrogate, value = objective.shared(objective.sums(found, labels), 0.0)
    assert value == 0
    for gradient in torch.autograd.grad(surrogate, heads):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("scheme, power", [("none", 0), ("sqrt", 0.5), ("balanced", 1)])
def test_class_weights(scheme, power):
    weights = class_weights(np.array([0, 0, 0, 1, -1]), 3, scheme)
    np.testing.assert_allclose(weights, [(4 / 9) ** power, (4 / 3) ** power, 0.0])

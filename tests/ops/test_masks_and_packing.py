"""Band masks against their definition, dead rows of the softmax, and the packed layout."""

import pytest
import torch

from rdfkern.ops.masks import band_mask, masked_softmax
from rdfkern.ops.packing import Packing


@pytest.mark.parametrize("lq, lk", [(1, 1), (4, 7), (7, 4), (5, 5), (0, 3), (3, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (-1, -1), (0, 0), (2, 1), (-1, 0), (1, -1), (9, 9)])
def test_band_mask_is_its_definition(lq, lk, is_causal, window):
    mask = band_mask(lq, lk, is_causal=is_causal, window=window)
    left, right = window or (-1, -1)
    for i in range(lq):
        at = i + lk - lq
        for j in range(lk):
            seen = not (is_causal and j > at)
            seen &= left < 0 or at - j <= left
            seen &= right < 0 or j - at <= right
            assert seen == (True if mask is None else bool(mask[i, j]))


def test_masked_softmax_gives_zero_and_zero_gradient_for_a_dead_row():
    scores = torch.randn(3, 4, dtype=torch.float64)
    scores[2] = -torch.inf
    scores.requires_grad_()
    visible = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    weights = masked_softmax(scores, visible)
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert torch.allclose(weights.sum(-1), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(gradient[1:], torch.zeros(2, 4, dtype=torch.float64))
    assert gradient[0].abs().sum() > 0


def test_masked_softmax_without_keys():
    assert masked_softmax(torch.zeros(2, 0), None).shape == (2, 0)


@pytest.mark.parametrize("lengths", [[3], [1, 4, 2], [0, 2, 0], [], [0]])
def test_packing_round_trip(lengths):
    total, longest = sum(lengths), max(lengths, default=0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = torch.randn(total, 2, dtype=torch.float64, requires_grad=True)
    packing = Packing.from_cu_seqlens(cu_seqlens, total, longest + 1)
    padded = packing.pad(packed)
    assert padded.shape == (len(lengths), longest + 1, 2)
    assert packing.valid.sum(1).tolist() == lengths
    assert (padded[~packing.valid] == 0).all()
    start = 0
    for row, length in enumerate(lengths):
        assert torch.equal(padded[row, :length], packed[start : start + length])
        start += length
    assert torch.equal(packing.unpad(padded), packed)
    weight = torch.randn_like(padded)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), packed)
    assert torch.equal(gradient, packing.unpad(weight))

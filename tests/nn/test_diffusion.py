"""TextGuidedDiffusion against its projections written out head by head."""

import pytest
import torch

from rdfkern.nn import TextGuidedDiffusion


def written_out(module, text, features, padding=None):
    """One dialogue (L, .): heads one by one, P materialised."""
    q, k = module.q_proj(text), module.k_proj(text)
    heads = []
    head, width = module.text_dim // module.num_heads, module.feature_dim // module.num_heads
    for h in range(module.num_heads):
        scores = q[:, h * head : (h + 1) * head] @ k[:, h * head : (h + 1) * head].T / head**0.5
        if module.window is not None:
            offset = torch.arange(len(text))[None] - torch.arange(len(text))[:, None]
            left, right = module.window
            scores = scores.masked_fill((offset < -left) | (offset > right), float("-inf"))
        if padding is not None:
            scores = scores.masked_fill(padding[None], float("-inf"))
        p = scores.softmax(-1)
        z0 = features[:, h * width : (h + 1) * width]
        z = z0
        for _ in range(module.steps):
            z = (1 - module.restart) * p @ z + module.restart * z0
        heads.append(z)
    return module.out_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [None, (2, 1)])
def test_dense_and_packed_equal_each_dialogue_written_out(bias, window):
    torch.manual_seed(0)
    module = TextGuidedDiffusion(6, 9, 3, steps=3, restart=0.2, bias=bias, window=window).double()
    assert (module.q_proj.bias is not None) == bias
    text, features = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 9).double()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = [written_out(module, text[0], features[0])]
    expected.append(written_out(module, text[1, :3], features[1, :3]))

    dense = module(text, features, key_padding_mask=padding)
    torch.testing.assert_close(dense[0], expected[0])
    torch.testing.assert_close(dense[1, :3], expected[1])
    packed = module(
        text[~padding], features[~padding], cu_seqlens=torch.tensor([0, 5, 8]), max_seqlen=5
    )
    torch.testing.assert_close(packed, torch.cat(expected))


def test_every_parameter_and_input_gets_a_gradient():
    torch.manual_seed(0)
    module = TextGuidedDiffusion(4, 4, 2, steps=2, restart=0.3)
    text, features = torch.randn(1, 4, 4), torch.randn(1, 4, 4, requires_grad=True)
    text.requires_grad_()
    module(text, features).square().sum().backward()
    for name, tensor in [*module.named_parameters(), ("text", text), ("features", features)]:
        assert tensor.grad is not None, name
        # A bias of the keys shifts every score of a row alike: softmax does not see it.
        if name != "k_proj.bias":
            assert tensor.grad.abs().max() > 1e-6, name


def test_impl_reaches_the_operation():
    torch.manual_seed(0)
    text, features = torch.randn(1, 4, 4), torch.randn(1, 4, 4)
    module = TextGuidedDiffusion(4, 4, 2, steps=2, restart=0.3, impl="triton")
    with pytest.raises(RuntimeError, match="triton"):
        module(text, features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 8, 4), "text_dim must be a positive multiple of num_heads"),
        ((8, 6, 4), "feature_dim must be a positive multiple of num_heads"),
        ((8, 8, 0), "num_heads must be at least 1"),
        ((0, 8, 4), "text_dim"),
    ],
)
def test_rejects_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextGuidedDiffusion(*arguments, steps=1, restart=0.5)


@pytest.mark.parametrize(
    ("text", "features", "options", "message"),
    [
        ((1, 3, 5), (1, 3, 8), {}, r"text must have shape \(B, L, 4\)"),
        ((1, 3, 4), (1, 3, 4), {}, r"features must have shape \(B, L, 8\)"),
        ((3, 4), (3, 8), {}, "text must have shape"),
        ((1, 3, 4), (1, 2, 8), {}, "leading dimensions of text"),
        ((1, 3, 4), (1, 3, 8), {"cu_seqlens": torch.tensor([0, 3])}, r"\(T, 4\) with cu_seqlens"),
    ],
)
def test_rejects_inputs(text, features, options, message):
    module = TextGuidedDiffusion(4, 8, 2, steps=1, restart=0.5)
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(text), torch.zeros(features), **options)

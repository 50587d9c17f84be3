import io
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rdfkern.models import NetworkConfig, build_network
from rdfkern.models.data import Dialogue, collate
from rdfkern.models.encoders import Denoiser, sinusoidal_positions
from rdfkern.models.fusion import TextGuidedFusion
from rdfkern.models.network import ReDiFu

DIMS = {"audio": 5, "text": 7, "visual": 3}
SMALL = NetworkConfig(width=16, heads=2, past=3, future=2, dropout=0.4)
VARIANTS = {
    "default": {},
    "temporal": {"denoise": "temporal"},
    "plain": {"denoise": "plain"},
    "no denoising": {"denoise": "none"},
    "two layers": {"layers": 2},
    "no relations": {"relations": "off"},
    "unlimited window": {"past": None, "future": None},
    "gate": {"fusion": "gate"},
    "all placed": {"context": "all"},
    "bare": {"denoise": "none", "relations": "off", "fusion": "gate"},
}
MODALITIES = {
    "three": DIMS,
    "timing": {"text": 4, "timing": 2},
    "odd names": {"keys": 3, "a.b": 2, "": 4, "text": 5, "forward": 1},
    "text": {"text": 6},
}


def dialogues_of(lengths, dims=DIMS, speakers=3, seed=0):
    random = np.random.default_rng(seed)
    return [
        Dialogue(
            str(index),
            tuple(f"s{who}" for who in random.integers(speakers, size=length)),
            random.integers(4, size=length),
            {name: random.normal(size=(length, dim)).astype("f") for name, dim in dims.items()},
        )
        for index, length in enumerate(lengths)
    ]


VOCABULARY = {"s0": 1, "s2": 2}


def batch_of(dialogues, dims=DIMS):
    return collate(dialogues, dims, VOCABULARY)


def network_of(config=SMALL, dims=DIMS, num_speakers=2, seed=0):
    torch.manual_seed(seed)
    network = build_network(config, dims, 4, num_speakers)
    with torch.no_grad():
        # Away from the symmetric start (unit weights, zero biases), where faults could hide.
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network.eval()


def flat(outputs):
    return {"fused": outputs.fused, **{f"of {k}": v for k, v in outputs.per_modality.items()}}


def assert_same(actual, expected, tolerance=1e-5):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_mates_and_order_do_not_matter(variant):
    network = network_of(replace(SMALL, **VARIANTS[variant]))
    dialogues = dialogues_of([6, 1, 13, 4])
    together = network(batch_of(dialogues))
    starts = np.cumsum([0] + [len(d) for d in dialogues])
    alone = [network(batch_of([d])) for d in dialogues]
    for part, (first, last) in zip(alone, itertools.pairwise(starts), strict=True):
        for name, logits in flat(together).items():
            torch.testing.assert_close(flat(part)[name], logits[first:last], rtol=1e-5, atol=1e-5)
    order = [2, 0, 3, 1]
    permuted = flat(network(batch_of([dialogues[i] for i in order])))
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    for name, logits in flat(together).items():
        torch.testing.assert_close(permuted[name], logits[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_every_parameter_is_used(variant, modalities):
    dims = MODALITIES[modalities]
    network = network_of(replace(SMALL, **VARIANTS[variant]), dims).train()
    batch = batch_of(dialogues_of([9, 1, 12], dims), dims)
    outputs = network(batch)
    assert outputs.fused.shape == (22, 4)
    assert set(outputs.per_modality) == set(dims)
    loss = F.cross_entropy(outputs.fused, batch.labels)
    for logits in outputs.per_modality.values():
        assert logits.shape == (22, 4)
        loss = loss + F.cross_entropy(logits, batch.labels)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_loss_alone_reaches_every_stream(variant):
    network = network_of(replace(SMALL, **VARIANTS[variant])).train()
    network(batch_of(dialogues_of([9, 12]))).fused.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("modalities", ["three", "text"])
def test_empty_batch_gives_zero_gradients(variant, modalities):
    dims = MODALITIES[modalities]
    network = network_of(replace(SMALL, **VARIANTS[variant]), dims).train()
    outputs = network(batch_of([], dims))
    assert outputs.fused.shape == (0, 4)
    sum(logits.sum() for logits in flat(outputs).values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_single_utterance():
    network = network_of()
    outputs = network(batch_of(dialogues_of([1])))
    assert outputs.fused.shape == (1, 4)
    assert outputs.fused.isfinite().all()


@pytest.mark.parametrize("speakers", [1, 300])
def test_any_number_of_speakers(speakers):
    network = network_of().train()
    outputs = network(batch_of(dialogues_of([400], speakers=speakers)))
    outputs.fused.sum().backward()
    assert outputs.fused.isfinite().all()


def test_renaming_the_speakers_of_a_dialogue_changes_nothing():
    network = network_of(num_speakers=0)
    dialogues = dialogues_of([8, 5])
    batch = collate(dialogues, DIMS)
    renumbered = replace(batch, speaker=torch.tensor([2, 0, 1])[batch.speaker])
    assert not torch.equal(batch.speaker, renumbered.speaker)
    assert_same(network(renumbered), network(batch), 0)


def test_who_speaks_matters():
    network = network_of(num_speakers=0)
    batch = collate(dialogues_of([8]), DIMS)
    alone = replace(batch, speaker=torch.zeros_like(batch.speaker))
    assert (network(alone).fused - network(batch).fused).abs().max() > 1e-3


def test_known_speakers_and_positions_do_not_touch_text_by_default():
    batch = batch_of(dialogues_of([8]))
    other = replace(batch, speaker_id=2 - batch.speaker_id)
    for context, reaches_text in (("others", False), ("all", True)):
        # Without relations, a modality's head sees that modality only.
        network = network_of(replace(SMALL, relations="off", context=context))
        before, after = network(batch).per_modality, network(other).per_modality
        assert not torch.allclose(before["audio"], after["audio"])
        assert torch.equal(before["text"], after["text"]) != reaches_text


@pytest.mark.parametrize("past, future", [(2, 0), (0, 3), (1, 1)])
def test_relations_reach_as_far_as_the_window(past, future):
    config = replace(SMALL, past=past, future=future, denoise="none")
    network = network_of(config).double()
    batch = batch_of(dialogues_of([13]))
    text = batch.features["text"].double().requires_grad_()
    outputs = network(replace(batch, features={**batch.features, "text": text}))
    # Two rounds of relations reach text, one of which may cross from audio: twice the window.
    (grad,) = torch.autograd.grad(outputs.per_modality["audio"][6].square().sum(), text)
    reached = grad.abs().sum(dim=1) > 1e-12
    assert reached.nonzero().flatten().tolist() == list(range(6 - 2 * past, 7 + 2 * future))


@pytest.mark.parametrize("fusion, reached", [("gate", [4]), ("diffusion", list(range(7)))])
def test_only_diffusion_carries_other_utterances_into_the_fused_stream(fusion, reached):
    config = replace(SMALL, fusion=fusion, denoise="none", relations="off")
    network = network_of(config).double()
    batch = batch_of(dialogues_of([7, 3]))
    audio = batch.features["audio"].double().requires_grad_()
    outputs = network(replace(batch, features={**batch.features, "audio": audio}))
    (grad,) = torch.autograd.grad(outputs.fused[4].square().sum(), audio)
    assert (grad.abs().sum(dim=1) > 1e-12).nonzero().flatten().tolist() == reached


def test_fusion_is_its_formula():
    torch.manual_seed(0)
    fusion = TextGuidedFusion(8, 2, 2, steps=3, restart=0.25, dropout=0.5).double().eval()
    text, audio, visual = torch.randn(3, 5, 8).double()
    restart = fusion.project(torch.cat([audio, visual], dim=1))
    q, k = fusion.diffusion.q_proj(text), fusion.diffusion.k_proj(text)
    diffused = []
    for columns in (slice(0, 4), slice(4, 8)):
        walk = torch.softmax(q[:, columns] @ k[:, columns].T / 2, dim=1)
        z = restart[:, columns]
        for _ in range(3):
            z = 0.75 * walk @ z + 0.25 * restart[:, columns]
        diffused.append(z)
    z = restart + fusion.diffusion.out_proj(torch.cat(diffused, dim=1))
    gate = torch.sigmoid(fusion.gate(torch.cat([text, z], dim=1)))
    expected = fusion.norm(text + fusion.mlp(gate * text + (1 - gate) * z))
    actual = fusion(text, [audio, visual], torch.tensor([0, 5]), 5)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_standardised_inputs():
    network, plain = network_of(), network_of()
    batch = batch_of(dialogues_of([7]))
    mean = {name: torch.randn(dim) for name, dim in DIMS.items()}
    std = {name: torch.rand(dim) + 0.5 for name, dim in DIMS.items()}
    std["text"][2] = 0.0
    network.set_input_statistics(mean, std)
    divisor = {name: torch.where(value > 0, value, 1.0) for name, value in std.items()}
    by_hand = {n: (value - mean[n]) / divisor[n] for n, value in batch.features.items()}
    assert_same(network(batch), plain(replace(batch, features=by_hand)))
    assert not torch.allclose(network(batch).fused, plain(batch).fused)


def test_state_dict_round_trip_and_order_of_modalities():
    network = network_of()
    network.set_input_statistics(
        {name: torch.randn(dim) for name, dim in DIMS.items()},
        {name: torch.rand(dim) + 1 for name, dim in DIMS.items()},
    )
    stored = io.BytesIO()
    torch.save(network.state_dict(), stored)
    stored.seek(0)
    other = network_of(dims=dict(reversed(DIMS.items())), seed=1)
    batch = batch_of(dialogues_of([7, 3]))
    assert not torch.equal(other(batch).fused, network(batch).fused)
    other.load_state_dict(torch.load(stored))
    assert_same(other(batch), network(batch), 0)


def test_parameter_budgets_of_the_denoisers_are_close():
    counts = {
        denoise: sum(p.numel() for p in Denoiser(128, 4, 1, denoise, 0.0).parameters())
        for denoise in ("differential", "temporal", "plain")
    }
    assert max(counts.values()) < 1.01 * min(counts.values()), counts


def test_plain_attention_layer_is_the_one_of_torch():
    torch.manual_seed(0)
    denoiser = Denoiser(16, 2, 1, "plain", 0.0).double()
    layer = denoiser.layers[0]
    peer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True).double()
    peer.self_attn.in_proj_weight = layer.attention.in_proj.weight
    peer.self_attn.in_proj_bias = layer.attention.in_proj.bias
    peer.self_attn.out_proj = layer.attention.out_proj
    peer.linear1, peer.linear2 = layer.feedforward[0], layer.feedforward[3]
    torch.nn.init.normal_(layer.attention.in_proj.bias)
    x = torch.randn(9, 16).double()
    expected = torch.cat([peer(x[None, :4])[0], peer(x[None, 4:])[0]])
    actual = layer(x, cu_seqlens=torch.tensor([0, 4, 9]), max_seqlen=5)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    gate = torch.sigmoid(denoiser.filter.gate(expected))
    torch.testing.assert_close(denoiser(x, torch.tensor([0, 4, 9]), 5), expected * gate)


def test_positions():
    table = sinusoidal_positions(torch.tensor([0, 1, 5000]), 5, torch.float64)
    for row, position in enumerate((0, 1, 5000)):
        for column in range(5):
            angle = position / 10000 ** (column % 3 / 3)
            expected = np.sin(angle) if column < 3 else np.cos(angle)
            assert abs(table[row, column] - expected) < 1e-9


def test_dropout_only_in_training():
    network, batch = network_of(), batch_of(dialogues_of([7, 3]))
    assert_same(network(batch), network(batch), 0)
    network.train()
    assert not torch.equal(network(batch).fused, network(batch).fused)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    network = network_of(replace(SMALL, **VARIANTS[variant])).train()
    batch = batch_of(dialogues_of([7, 1, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(batch)
    for logits in flat(outputs).values():
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
    outputs.fused.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(batch)
    assert_same(rounded, network(batch), 0.15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_algorithms(variant):
    network = network_of(replace(SMALL, **VARIANTS[variant])).train()
    batch = batch_of(dialogues_of([17, 9, 30]))

    def gradients():
        network.zero_grad()
        torch.manual_seed(3)
        sum(logits.square().sum() for logits in flat(network(batch)).values()).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        for first, second in zip(gradients(), gradients(), strict=True):
            assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


def test_float64_agrees():
    network, batch = network_of(), batch_of(dialogues_of([7, 3]))
    single = network(batch)
    double = network.double()(batch)
    assert double.fused.dtype == torch.float64
    assert_same(
        single,
        type(double)(
            double.fused.float(),
            {name: value.float() for name, value in double.per_modality.items()},
        ),
    )


@pytest.mark.parametrize("denoise", ["differential", "temporal", "plain"])
def test_a_long_meeting(denoise):
    network = network_of(replace(SMALL, past=10, future=10, denoise=denoise)).train()
    batch = batch_of(dialogues_of([3400], speakers=9))
    started = time.perf_counter()
    outputs = network(batch)
    F.cross_entropy(outputs.fused, batch.labels).backward()
    assert time.perf_counter() - started < 60
    assert outputs.fused.isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 12, "heads": 8}, "width must be a multiple of 2 \\* heads"),
        ({"width": 12, "heads": 8, "denoise": "plain"}, "width must be a multiple of heads"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"past": -1}, "past must be at least 0"),
        ({"future": -2}, "future must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"restart": 1.5}, "restart must be in \\[0, 1\\], got 1.5"),
        ({"restart": float("nan")}, "restart must be in"),
        ({"dropout": 1.0}, "dropout must be in \\[0, 1\\)"),
        ({"denoise": "average"}, "denoise must be one of differential, .*'average'"),
        ({"preset": "released"}, "preset must be one of"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    "dims, classes, speakers, message",
    [
        ({"audio": 3}, 4, 0, "dims must contain 'text', got \\['audio'\\]"),
        ({"text": 3, "audio": 0}, 4, 0, "dims\\['audio'\\] must be at least 1"),
        ({"text": 3}, 0, 0, "num_classes must be at least 1"),
        ({"text": 3}, 4, -1, "num_speakers must be at least 0"),
    ],
)
def test_bad_arguments(dims, classes, speakers, message):
    with pytest.raises(ValueError, match=message):
        ReDiFu(SMALL, dims, classes, speakers)


def test_batches_that_do_not_fit():
    network = network_of()
    batch = batch_of(dialogues_of([4]))
    features = batch.features
    fewer = {name: value for name, value in features.items() if name != "audio"}
    with pytest.raises(ValueError, match="batch.features must have the modalities"):
        network(replace(batch, features=fewer))
    with pytest.raises(ValueError, match="batch.features must have the modalities.*'timing'"):
        network(replace(batch, features={**features, "timing": features["text"]}))
    wide = {**features, "visual": torch.zeros(4, 9)}
    with pytest.raises(ValueError, match=r"batch.features\['visual'\] .*\(4, 3\), got \(4, 9\)"):
        network(replace(batch, features=wide))


def test_bad_statistics():
    network = network_of()
    zeros = {name: torch.zeros(dim) for name, dim in DIMS.items()}
    with pytest.raises(ValueError, match="mean must have the modalities"):
        network.set_input_statistics({"text": zeros["text"]}, zeros)
    with pytest.raises(ValueError, match=r"std\['text'\] must have shape \(7,\)"):
        network.set_input_statistics(zeros, {**zeros, "text": torch.ones(3)})
    with pytest.raises(ValueError, match=r"std\['audio'\] must be finite and at least 0"):
        network.set_input_statistics(zeros, {**zeros, "audio": -torch.ones(5)})
    with pytest.raises(ValueError, match=r"mean\['audio'\] must be finite"):
        network.set_input_statistics({**zeros, "audio": torch.full((5,), float("nan"))}, zeros)


def test_a_released_preset_takes_no_other_setting():
    config = NetworkConfig(preset="released-meld", width=32, steps=3)
    with pytest.raises(ValueError, match="released-meld.*width, steps must keep the default"):
        build_network(config, {"text": 3, "audio": 3, "visual": 3}, 7, 9)


@pytest.mark.parametrize("variant, speakers", [("iemocap", 2), ("meld", 9)])
def test_a_released_preset_has_the_released_number_of_speakers(variant, speakers):
    config = NetworkConfig(preset=f"released-{variant}")
    network = build_network(config, {"text": 3, "audio": 3, "visual": 3}, 7, 40)
    assert network.speaker_embedding.num_embeddings == speakers + 1

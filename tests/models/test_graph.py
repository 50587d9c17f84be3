import numpy as np
import pytest
import torch

from rdfkern import RelationSpec, relation_conv
from rdfkern.models.data import Dialogue, collate
from rdfkern.models.graph import (
    NUM_RELATIONS,
    CrossModalRelations,
    ModalRelations,
    speaker_graph,
)


def batch_of(*speakers):
    """One dialogue per sequence of speaker names, without features."""
    dialogues = [
        Dialogue(str(index), tuple(names), np.full(len(names), -1), {})
        for index, names in enumerate(speakers)
    ]
    return collate(dialogues, {})


def edges_of(batch, past, future):
    edge_index, edge_type = speaker_graph(batch, past, future).to_edges()
    return set(zip(*edge_index.tolist(), edge_type.tolist(), strict=True))


def test_edges_follow_the_window_speaker_and_dialogue():
    speakers = ["abac", "b", "aab"]
    expected, start = set(), 0
    for names in speakers:
        for i, target in enumerate(names):
            for j, source in enumerate(names):
                if i - 2 <= j <= i + 1:
                    same = target == source
                    if j == i:
                        relation = 1
                    elif j < i:
                        relation = 0 if same else 3
                    else:
                        relation = 2 if same else 4
                    expected.add((start + j, start + i, relation))
        start += len(names)
    assert edges_of(batch_of(*speakers), 2, 1) == expected


def test_edges_ignore_the_names_and_the_number_of_speakers():
    first = edges_of(batch_of("abcab"), None, 3)
    assert first == edges_of(batch_of("zxyzx"), None, 3)
    crowd = "abcab" + "".join(chr(200 + index) for index in range(300))
    found = edges_of(batch_of(crowd), None, 3)
    assert {edge for edge in found if edge[0] < 5 and edge[1] < 5} == first


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_cross_modal_relations_are_the_graph_of_all_nodes(modalities):
    torch.manual_seed(0)
    batch, width = batch_of("abacb", "a", "bbca"), 6
    rows = batch.speaker.shape[0]
    relations = CrossModalRelations(modalities, width, 0.0).double()
    streams = [torch.randn(rows, width).double().requires_grad_() for _ in range(modalities)]
    heard = []
    relations.activation.register_forward_hook(lambda _, args, __: heard.append(args[0]))
    relations(streams, speaker_graph(batch, 2, 1))

    nodes = torch.stack(streams, dim=1).flatten(0, 1)  # utterance by utterance
    spec = RelationSpec.cross_modal(batch.num_speakers, modalities, 2, 1)
    keys = (batch.speaker[:, None] * modalities + torch.arange(modalities)).flatten()
    position = torch.cat([torch.arange(n) for n in batch.cu_seqlens.diff().tolist()])
    graph = spec.bind(keys, batch.cu_seqlens * modalities, position.repeat_interleave(modalities))
    assert spec.num_relations == NUM_RELATIONS * modalities * (modalities - 1)
    expected = relation_conv(nodes, relations.weight, graph, aggr="mean", impl="reference")
    expected = expected.view(rows, modalities * width)
    torch.testing.assert_close(heard[0], expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(expected)
    inputs = [*streams, relations.weight]
    for actual, truth in zip(
        torch.autograd.grad((heard[0] * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)


def test_modal_relations_match_a_loop_over_utterances():
    torch.manual_seed(1)
    batch, width, heads, modalities = batch_of("abac", "ba"), 8, 2, 3
    rows = batch.speaker.shape[0]
    layer = ModalRelations(modalities, width, heads, 0.5).double().eval()
    torch.nn.init.normal_(layer.relation)
    streams = [torch.randn(rows, width).double() for _ in range(modalities)]
    graph = speaker_graph(batch, 1, 2)
    edges = list(zip(*graph.to_edges()[0].tolist(), graph.to_edges()[1].tolist(), strict=True))
    for m, (x, actual) in enumerate(zip(streams, layer(streams, graph), strict=True)):
        value, dst, src = layer.project[m](x).split([width, heads, heads], dim=1)
        message = torch.zeros(rows, width).double()
        for target in range(rows):
            incoming = [(source, relation) for source, t, relation in edges if t == target]
            for head in range(heads):
                columns = slice(head * width // heads, (head + 1) * width // heads)
                logits = torch.stack(
                    [
                        dst[target, head]
                        + src[source, head]
                        + layer.relation[relation, m * heads + head]
                        for source, relation in incoming
                    ]
                )
                weights = torch.softmax(torch.nn.functional.leaky_relu(logits, 0.2), dim=0)
                for weight, (source, _) in zip(weights, incoming, strict=True):
                    message[target, columns] += weight * value[source, columns]
        expected = layer.norm[m](x + layer.out[m](torch.nn.functional.gelu(message)))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

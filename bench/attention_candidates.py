"""The candidates of an `AttentionShape`: peers in every layout that makes sense, and rdfkern."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rdfkern._backends.dispatch import CHAINS

from . import attention_peers as peers
from .attention_peers import NAMES, Peer, Visible
from .attention_problem import AttentionProblem, ours
from .candidates import Candidate, Run, Unsuitable, check_memory, fresh
from .shapes import AttentionShape

# Maps in memory at a time: scores, weights and, with a backward, what autograd keeps of two maps.
MAPS_OF_EAGER = 8


def candidates(shape: AttentionShape, device: torch.device) -> list[Candidate]:
    """All that the shape has a use for on a kind of device."""
    plain: dict[str, Peer] = {"eager": peers.eager, **peers.SDPA_PEERS}
    found = [ours(impl) for impl in CHAINS[device.type] if impl != "reference"]
    if shape.conversations is not None:
        for name, peer in plain.items():
            found.append(Candidate(f"padded batch: {name}", _padded(peer)))
            found.append(Candidate(f"loop: {name}", _looped(peer)))
        found.append(Candidate("padded batch: 2 FlexAttention calls", _padded(peers.flex)))
    else:
        found += [Candidate(name, _dense(peer)) for name, peer in plain.items()]
        if shape.compiled:
            found += [
                Candidate(f"compiled: {name}", _dense(peer, compiled=True))
                for name, peer in plain.items()
            ]
        found.append(Candidate("2 FlexAttention calls", _dense(peers.flex)))
    if device.type == "cuda":
        found.append(Candidate("4 FlashAttention calls", _flash))
        if shape.conversations is None:
            found += [
                Candidate(f"{name} [{label}]", _dense(peers.with_backend(peer, backend)))
                for name, peer in peers.SDPA_PEERS.items()
                for label, backend in peers.GPU_BACKENDS.items()
            ]
    return found


def _dense(peer: Peer, *, compiled: bool = False) -> Callable[[AttentionProblem], Run]:
    def prepare(problem: AttentionProblem) -> Run:
        shape = problem.shape
        _check_fits(peer, problem, shape.batch * shape.queries * shape.num_keys)
        return _run(peer, problem, fresh(problem.inputs), _visible(peer, problem), compiled)

    return prepare


def _padded(peer: Peer) -> Callable[[AttentionProblem], Run]:
    """Inputs are padded before the time starts; the output stays padded."""

    def prepare(problem: AttentionProblem) -> Run:
        longest = max(problem.lengths)
        lengths = torch.tensor(problem.lengths, device=problem.device)
        taken = torch.arange(longest, device=problem.device) < lengths[:, None]  # [B, L]
        _check_fits(peer, problem, len(problem.lengths) * longest**2)

        def pad(packed: Tensor) -> Tensor:
            padded = packed.new_zeros(*taken.shape, *packed.shape[1:])
            padded[taken] = packed
            return padded.transpose(1, 2).contiguous()  # [B, H, L, D]

        def unpad(padded: Tensor) -> Tensor:
            return padded if padded.dim() < 4 else padded.transpose(1, 2)[taken]

        visible = Visible(mask=taken[:, None, None, :])
        if peer is peers.flex:
            mask = peers.block_mask(longest, longest, False, None, lengths, problem.device)
            visible = Visible(block_mask=mask)
        packed = {name: pad(problem.inputs[name]) for name in NAMES}
        leaves = fresh(packed | {"lam": problem.inputs["lam"]})
        run = _run(peer, problem, leaves, visible)
        run.to_layout, run.from_layout = pad, unpad
        return run

    return prepare


def _looped(peer: Peer) -> Callable[[AttentionProblem], Run]:
    """One call for each sequence."""

    def prepare(problem: AttentionProblem) -> Run:
        leaves = fresh(problem.inputs)

        def forward() -> Tensor:
            tensors = (leaves[name] for name in NAMES)
            lam = leaves["lam"][:, None, None]
            return peers.in_a_loop(peer, problem.lengths, *tensors, lam)

        return Run(forward, leaves)

    return prepare


def _run(
    peer: Peer,
    problem: AttentionProblem,
    leaves: dict[str, Tensor],
    visible: Visible,
    compiled: bool = False,
) -> Run:
    forward_only = None
    if peer is peers.flex and problem.device.type == "cpu":
        forward_only = "FlexAttention has no backward on CPUs"
        leaves = {name: leaf.detach() for name, leaf in leaves.items()}
    call = torch.compile(peer, dynamic=False) if compiled else peer

    # In every call, as models do that keep values in parts.
    joins = problem.shape.value_parts > 1 and peer is not peers.four_calls

    def forward() -> Tensor:
        tensors = (leaves[name] for name in NAMES)
        tensors = peers.joined(*tensors) if joins else tensors
        return call(*tensors, leaves["lam"][:, None, None], visible)

    return Run(forward, leaves, forward_only=forward_only)


def _visible(peer: Peer, problem: AttentionProblem) -> Visible:
    shape, device = problem.shape, problem.device
    queries, keys, window = shape.queries, shape.num_keys, shape.window
    if peer is peers.flex:
        mask = peers.block_mask(queries, keys, shape.is_causal, window, None, device)
        return Visible(block_mask=mask)
    if shape.is_causal and window is None and queries == keys:
        return Visible(is_causal=True)
    return Visible(mask=problem.mask())


def _check_fits(peer: Peer, problem: AttentionProblem, pairs: int) -> None:
    if peer is peers.eager:
        maps = MAPS_OF_EAGER * problem.shape.heads * pairs
        check_memory(maps * problem.dtype.itemsize, problem.device)


def _flash(problem: AttentionProblem) -> Run:
    shape = problem.shape
    peers.flash_attention()
    if shape.head_dim * 2 != shape.value_dim:
        raise Unsuitable("its four calls need a value of twice the head dim")
    dense = problem.lengths is None

    def swap(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if dense and tensor.dim() >= 4 else tensor

    leaves = fresh({name: swap(t).contiguous() for name, t in problem.inputs.items()})

    def forward() -> Tensor:
        tensors = [leaves[name] for name in NAMES]
        lam = leaves["lam"][:, None]
        if dense:
            return peers.flash_four_calls(*tensors, lam, shape.is_causal, shape.window)
        starts, longest = problem.cu_seqlens, max(problem.lengths)
        return peers.flash_varlen_four_calls(*tensors, lam, starts, longest)

    return Run(forward, leaves, swap, swap)

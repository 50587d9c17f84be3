"""One shape at a time: check every candidate, time those that are right, interleaved."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .candidates import Candidate, Problem, Run, Unsuitable
from .checks import Check, check
from .machine import MatrixProduct, device_name
from .memory import peak_memory
from .problems import kind_of
from .rounds import interleave
from .shapes import BOTH, FORWARD, SHAPES, Shape


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: `cpu` or `cuda`.
        threads: torch's, on the CPU.
        seconds: to spend on the rounds of a shape and direction, about.
        conversations: folder of real ones, or None.
        tuned: names of the shapes whose Triton kernels use measured launch configurations.
    """

    device: torch.device
    threads: int
    seconds: float
    conversations: Path | None = None
    tuned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LeftOut:
    """A candidate that has no figure, and why; `red` if it computed something wrong."""

    reason: str
    red: bool = False


@dataclass(frozen=True)
class Measured:
    """Seconds of a call in every round, and what is known about them."""

    seconds: list[float]
    info: dict[str, Any]


@dataclass
class _Prepared:
    shape: Shape
    problem: Problem
    truth: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    runs: dict[str, Run] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)


def candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """All candidates of a shape on a kind of device."""
    return kind_of(shape).candidates(shape, device)


class Bench:
    """Measurements under one set of settings; keeps the shape it measured last prepared."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self._prepared: _Prepared | None = None

    def measure(
        self, shape_name: str, direction: str, names: list[str]
    ) -> dict[str, Measured | LeftOut]:
        """Figures, or why there are none, of the named candidates."""
        shape, device = SHAPES[shape_name], self.settings.device
        prepared = self._prepare(shape)
        chosen = [c for c in candidates(shape, device) if c.name in names]
        results: dict[str, Measured | LeftOut] = {}
        timed: dict[str, Callable[[], Any]] = {}
        for candidate in chosen:
            reason = self._check(prepared, candidate, direction)
            if reason is None:
                run = prepared.runs[candidate.name]
                timed[candidate.name] = _timed_call(run, prepared.problem, direction)
            else:
                results[candidate.name] = reason
        chosen = [candidate for candidate in chosen if candidate.name in timed]
        return results | self._time(prepared, chosen, timed, direction)

    def _time(
        self,
        prepared: _Prepared,
        chosen: list[Candidate],
        calls: dict[str, Callable[[], Any]],
        direction: str,
    ) -> dict[str, Measured]:
        device, shape = self.settings.device, prepared.shape
        product = MatrixProduct(shape, device)
        with self._autotuning(shape):
            timings, least = interleave(
                {c.name: calls[c.name] for c in chosen if c.ours is None},
                {c.name: calls[c.name] for c in chosen if c.ours is not None},
                product.call,
                device,
                self.settings.seconds,
            )
            memory = {name: peak_memory(call, device) for name, call in calls.items()}
        flops, rate = prepared.problem.useful_flops(direction), product.flops / least
        measured = {}
        for candidate in chosen:
            name, timing = candidate.name, timings[candidate.name]
            figures = {
                "iterations": timing.iterations,
                "peak_memory_bytes": memory[name],
                "check": prepared.checks[name].as_info(),
                "useful_flops": flops,
                "gemm_flops_per_second": rate,
                "gemm_share": flops / min(timing.seconds) / rate,
            }
            info = self._info(prepared, candidate, direction) | figures
            measured[name] = Measured(timing.seconds, info)
        return measured

    def _prepare(self, shape: Shape) -> _Prepared:
        if self._prepared is None or self._prepared.shape is not shape:
            self._prepared = None
            gc.collect()
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            device, folder = self.settings.device, self.settings.conversations
            problem = kind_of(shape).problem(shape, device, folder)
            self._prepared = _Prepared(shape, problem, problem.truth(), problem.plain())
        return self._prepared

    def _check(self, prepared: _Prepared, candidate: Candidate, direction: str) -> LeftOut | None:
        name = candidate.name
        if name not in prepared.runs and name not in prepared.left_out:
            outcome = self._try(prepared, candidate)
            if isinstance(outcome, LeftOut):
                prepared.left_out[name] = outcome
            else:
                prepared.runs[name], prepared.checks[name] = outcome
        if name in prepared.left_out:
            return prepared.left_out[name]
        run, result = prepared.runs[name], prepared.checks[name]
        if direction == BOTH and run.forward_only:
            return LeftOut(run.forward_only)
        if not result.green:
            where = f"{result.tensor} errs {result.ratio:.3g} times what plain torch does"
            return LeftOut(f"check red: {where}", red=True)
        return None

    def _try(self, prepared: _Prepared, candidate: Candidate) -> tuple[Run, Check] | LeftOut:
        problem = prepared.problem
        if candidate.ours is not None:
            reason = problem.reasons()[candidate.ours]
            if reason is not None:
                return LeftOut(reason)
        try:
            with self._autotuning(prepared.shape):
                run = candidate.prepare(problem)
                return run, self._compare(prepared, run, ours=candidate.ours is not None)
        except Unsuitable as error:
            return LeftOut(str(error))
        except Exception as error:  # peers fail in their own ways; ours may not
            first_line = (str(error).strip().splitlines() or [""])[0][:200]
            return LeftOut(f"{type(error).__name__}: {first_line}", red=candidate.ours is not None)

    def _compare(self, prepared: _Prepared, run: Run, *, ours: bool) -> Check:
        problem = prepared.problem
        with torch.no_grad():
            out = run.from_layout(run.forward())
        results = [problem.observed(out, {})]
        if BOTH in problem.shape.directions and not run.forward_only:
            out, gradients = run.both(run.to_layout(problem.checked_gradient))
            gradients = {name: run.from_layout(g) for name, g in gradients.items()}
            results.append(problem.observed(run.from_layout(out), gradients))
        checks = [check(found, prepared.plain, prepared.truth, ours=ours) for found in results]
        return max(checks, key=lambda each: each.worst)

    def _autotuning(self, shape: Shape) -> AbstractContextManager[Any]:
        return _Environment("RDFKERN_AUTOTUNE", str(int(shape.name in self.settings.tuned)))

    def _info(self, prepared: _Prepared, candidate: Candidate, direction: str) -> dict[str, Any]:
        shape, device = prepared.shape, self.settings.device
        usable = [impl for impl, reason in prepared.problem.reasons().items() if reason is None]
        return {
            "operation": shape.op,
            "candidate": candidate.name,
            "impl": candidate.ours,
            "automatic": candidate.ours is not None and candidate.ours == usable[0],
            "shape": shape.name,
            "numbers": shape.numbers(),
            "conversations": prepared.problem.source,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "direction": direction,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "torch": torch.__version__,
            "autotuned": shape.name in self.settings.tuned,
        }


def _timed_call(run: Run, problem: Problem, direction: str) -> Callable[[], Any]:
    if direction == FORWARD:
        return torch.no_grad()(run.forward)
    gradient = run.to_layout(problem.gradient)
    return lambda: run.both(gradient)


class _Environment(AbstractContextManager):
    """A variable of the environment for a while."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        self.before = os.environ.get(self.name)
        os.environ[self.name] = self.value

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            del os.environ[self.name]
        else:
            os.environ[self.name] = self.before

"""Choice of implementation: argument, then context manager, then environment, then automatic.

Every implementation of an operation has one predicate. It returns None where the implementation
can run, or the reason why not; dispatch, `explain`, `rdfkern.env` and the test skips all ask it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "RDFKERN_BACKEND"
CHAINS = {
    "cuda": ("triton", "cuda", "torch", "reference"),
    "cpu": ("cpu", "torch", "reference"),
}
OTHER_DEVICES = ("torch", "reference")
CHOICES = ("auto", "triton", "cuda", "cpu", "torch", "reference")

logger = logging.getLogger("rdfkern")
_requested: ContextVar[str] = ContextVar("rdfkern_backend", default="auto")
_imported: dict[tuple[str, str], Callable[..., Any]] = {}
_logged: set[tuple[str, str, str]] = set()

Arguments = Mapping[str, Any]


class BackendUnavailableError(RuntimeError):
    """The implementation that was asked for cannot run; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation: `module` holds a function with the operation's name.

    `can_run` gets the validated arguments, or None when only the environment is asked about.
    """

    module: str
    can_run: Callable[[Arguments | None], str | None] = lambda arguments: None


@dataclass(frozen=True)
class Operation:
    """A public operation: its argument check and its implementations by name.

    `validate` takes the public arguments (without `impl`) and returns the canonical ones,
    as a mapping that every implementation accepts as keywords.
    """

    name: str
    validate: Callable[..., Arguments]
    implementations: Mapping[str, Implementation]

    def reason(self, choice: str, arguments: Arguments | None) -> str | None:
        """Why `choice` cannot run, or None."""
        if choice not in self.implementations:
            return f"this version has no {choice} implementation of {self.name}"
        return self.implementations[choice].can_run(arguments)

    def select(self, arguments: Arguments, impl: str) -> str:
        """Name of the implementation to run for these arguments."""
        choice = _resolve_request(impl)
        if choice != "auto":
            reason = self.reason(choice, arguments)
            if reason is not None:
                raise BackendUnavailableError(f"impl={choice!r} cannot run {self.name}: {reason}")
            return choice
        reasons = []
        for candidate in CHAINS.get(_device_type(arguments), OTHER_DEVICES):
            reason = self.reason(candidate, arguments)
            if reason is None:
                return candidate
            reasons.append(f"{candidate}: {reason}")
            _log_once(self.name, candidate, reason)
        raise BackendUnavailableError(
            f"no implementation can run {self.name}: " + "; ".join(reasons)
        )

    def run(self, arguments: Arguments, impl: str) -> Any:
        """Select an implementation, import it if this is its first call, and call it."""
        module = self.implementations[self.select(arguments, impl)].module
        _import(module, self.name)
        return _imported[module, self.name](**arguments)


def translated(
    can_run: Callable[[Arguments | None], str | None], translate: Callable[[Arguments], Arguments]
) -> Callable[[Arguments | None], str | None]:
    """The predicate of an operation on the kernels of another; `translate` makes its arguments."""
    return lambda arguments: can_run(None if arguments is None else translate(arguments))


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Make an operation known to `explain`, `available_backends` and `rdfkern.env`."""
    OPERATIONS[operation.name] = operation
    return operation


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one implementation for every rdfkern operation called inside the `with` block.

    Args:
        name: `auto`, `triton`, `cuda`, `cpu`, `torch` or `reference`. An `impl=` argument of a
            call still wins; the environment variable `RDFKERN_BACKEND` does not.

    Raises:
        ValueError: `name` is none of these. An operation that cannot run with it raises
            `BackendUnavailableError` when it is called.

    Compiled code reads the choice when `torch.compile` traces it.
    """
    _check_choice("name", name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def available_backends(op: str, *inputs: Any, **options: Any) -> dict[str, str | None]:
    """Every implementation of an operation, in order of choice, with None or why it can't run.

    Args:
        op: name of a public operation, such as `"diff_attention"`.
        inputs, options: the arguments that the operation would be called with. Without any, only
            the environment is asked about, and every implementation is listed.

    Raises:
        ValueError: `op` is unknown, or the arguments are not valid for it.
    """
    if op not in OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(sorted(OPERATIONS))}, got {op!r}")
    operation = OPERATIONS[op]
    if not inputs and not options:
        return {choice: operation.reason(choice, None) for choice in CHOICES[1:]}
    arguments = operation.validate(*inputs, **options)
    chain = CHAINS.get(_device_type(arguments), OTHER_DEVICES)
    return {choice: operation.reason(choice, arguments) for choice in chain}


def explain(op: str, *inputs: Any, **options: Any) -> str:
    """Say in words which implementation an operation would use, and why not the ones before it.

    Takes the arguments of `available_backends` and raises what it raises.
    """
    backends = available_backends(op, *inputs, **options)
    asked = _resolve_request("auto")
    usable = [name for name, reason in backends.items() if reason is None]
    used = next(iter(usable), "none") if asked == "auto" else asked
    why = "first that can run" if asked == "auto" else "asked for by use_backend or RDFKERN_BACKEND"
    lines = [f"{op}: {used} ({why})"]
    lines += [f"  {name}: {reason or 'can run'}" for name, reason in backends.items()]
    return "\n".join(lines)


def _import(module: str, function: str) -> None:
    # Compiled code may not call import_module, nor take a function from here: it finds it by name.
    if (module, function) not in _imported:
        imported = importlib.import_module(module, package="rdfkern")
        _imported[module, function] = getattr(imported, function)


@cache
def kernel_module(name: str, package: str) -> Any:
    """The module, imported at the first call; asking for it again takes longer otherwise."""
    return importlib.import_module(name, package=package)


def _outer_request() -> str:
    requested = _requested.get()
    if requested != "auto":
        return requested
    return _check_choice(ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


# What torch.compiler.assume_constant_result sets. Calling it would import the compiler, and with
# it Triton, when this package is imported.
_import._dynamo_marked_constant = True
_outer_request._dynamo_marked_constant = True


def _resolve_request(impl: str) -> str:
    return _outer_request() if _check_choice("impl", impl) == "auto" else impl


def _check_choice(argument: str, name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{argument} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


def _device_type(arguments: Arguments) -> str:
    tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
    first = next(tensors, None)
    return "cpu" if first is None else first.device.type


def _log_once(operation: str, choice: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (operation, choice, reason) in _logged:
        return
    _logged.add((operation, choice, reason))
    logger.info("%s: not %s: %s", operation, choice, reason)

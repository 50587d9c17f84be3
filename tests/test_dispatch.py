"""Order of choice, reasons and errors of the dispatcher, on an operation made for the test."""

import logging
import sys
import types

import pytest
import torch

from rdfkern import BackendUnavailableError, available_backends, explain, use_backend
from rdfkern._backends import dispatch
from rdfkern._backends.dispatch import ENVIRONMENT_VARIABLE, Implementation, Operation


def _needs_even(arguments):
    if arguments is not None and len(arguments["x"]) % 2:
        return "the number of rows is odd"
    return None


@pytest.fixture
def doubled(monkeypatch):
    """An operation with three implementations that report which one ran."""
    for name in ("cpu", "torch", "reference"):
        module = types.ModuleType(f"rdfkern_test_{name}")
        module.doubled = lambda x, name=name: (name, 2 * x)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    operation = Operation(
        "doubled",
        lambda x: {"x": x},
        {
            "cpu": Implementation("rdfkern_test_cpu", _needs_even),
            "torch": Implementation("rdfkern_test_torch"),
            "reference": Implementation("rdfkern_test_reference"),
        },
    )
    monkeypatch.setitem(dispatch.OPERATIONS, "doubled", operation)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    return lambda x, impl="auto": operation.run(operation.validate(x), impl)[0]


EVEN, ODD = torch.ones(2), torch.ones(3)


def test_automatic_choice_moves_down_the_chain(doubled):
    assert doubled(EVEN) == "cpu"
    assert doubled(ODD) == "torch"


def test_precedence_is_argument_context_environment(doubled, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert doubled(EVEN) == "torch"
    with use_backend("reference"):
        assert doubled(EVEN) == "reference"
        assert doubled(EVEN, "cpu") == "cpu"
        with use_backend("torch"):
            assert doubled(EVEN) == "torch"
        assert doubled(EVEN) == "reference"
    assert doubled(EVEN) == "torch"


def test_explicit_choice_that_cannot_run_raises_with_the_reason(doubled):
    with pytest.raises(BackendUnavailableError, match="'cpu'.*rows is odd"):
        doubled(ODD, "cpu")
    with pytest.raises(BackendUnavailableError, match="no triton implementation of doubled"):
        doubled(EVEN, "triton")


def test_unknown_names_are_rejected(doubled, monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of auto, .*'fast'"):
        doubled(EVEN, "fast")
    with pytest.raises(ValueError, match="name must be one of"), use_backend("fast"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} must be one of"):
        doubled(EVEN)
    with pytest.raises(ValueError, match="op must be one of .*'tripled'"):
        available_backends("tripled")


def test_available_backends_and_explain_give_the_predicates_words(doubled):
    assert available_backends("doubled", ODD) == {
        "cpu": "the number of rows is odd",
        "torch": None,
        "reference": None,
    }
    assert available_backends("doubled")["cuda"] == (
        "this version has no cuda implementation of doubled"
    )
    text = explain("doubled", ODD)
    assert text.splitlines()[0].startswith("doubled: torch")
    assert "cpu: the number of rows is odd" in text
    with use_backend("reference"):
        assert explain("doubled", ODD).startswith("doubled: reference (asked for")


def test_a_skipped_implementation_is_logged_once(doubled, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="rdfkern"):
        doubled(ODD)
        doubled(ODD)
    assert [record.getMessage() for record in caplog.records] == [
        "doubled: not cpu: the number of rows is odd"
    ]

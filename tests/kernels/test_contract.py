"""The table of implementations against the protocols of ``kernels_pallas.contract``, and the package's public names."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import kernels_pallas as kp
from kernels_pallas import contract, dispatch
from kernels_pallas.testing.cases import BY_NAME, FLOAT32, expected, failures, make_case, run_vjp

GLA, LAYER = "gated_linear_attention", "lawcat_attention"


def follows(function, protocol, name: str) -> bool:
    """Whether parameters have the names, order and kinds of the protocol's; further ones need a default."""
    want = inspect.signature(getattr(protocol, name)).parameters.values()
    got = list(inspect.signature(function).parameters.values())
    named = [(p.name, p.kind) for p in got if p.name in {w.name for w in want}]
    extra = [p for p in got if p.name not in {w.name for w in want}]
    return named == [(w.name, w.kind) for w in want] and all(p.default is not p.empty for p in extra)


@pytest.mark.parametrize("name", dispatch.IMPLEMENTATIONS)
def test_backend_follows_the_protocols(name):
    forward, backward = dispatch.forward_module(GLA, name), dispatch.backward_module(GLA, name)
    for module, protocol, functions, required in (
        (forward, contract.Forward, ("supports", "forward"), True),
        (backward, contract.Backward, ("backward",), True),
        (forward, contract.Decode, ("decode",), False),
        (forward, contract.SegmentState, ("segment_state",), False),
        (backward, contract.SegmentCotangent, ("segment_dstate",), False),
    ):
        for function in functions:
            assert hasattr(module, function) or not required, function
            if hasattr(module, function):
                assert follows(getattr(module, function), protocol, function), (module.__name__, function)
    try:
        layer = dispatch.forward_module(LAYER, name)
    except LookupError:
        return
    assert follows(layer.supports, contract.Layer, "supports")
    assert follows(layer.forward, contract.Layer, "forward")


def test_a_backend_is_one_file_and_one_row(monkeypatch):
    """A file in the op's folder and a row of the table are all that a new implementation takes."""
    toy = type(sys)("kernels_pallas.gated_linear_attention.toy")
    reference = importlib.import_module("kernels_pallas.gated_linear_attention.reference")
    toy.supports = lambda *args, lower_bound, **options: None if lower_bound is not None else "it needs a bound"
    toy.forward, toy.backward = reference.forward, reference.backward
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    monkeypatch.setitem(dispatch.BACKENDS, "toy", dispatch.Backend("toy", "cpu"))
    case = make_case(BY_NAME["gla"], length=5, heads=2, K=8, V=8)
    got = run_vjp.__wrapped__(case.arrays, case.state, case.cotangents, **case.options, implementation="toy")
    assert not failures(got, expected(case), FLOAT32)
    q = case.arrays[0]
    assert kp.implementation_for(q, q, q, -q, implementation="toy") == "toy"
    with pytest.raises(ValueError, match="'toy' cannot be used: it needs a bound"):
        kp.gated_linear_attention(q, q, q, -q, gate_lower_bound=None, implementation="toy")


def test_an_op_is_a_function_whatever_is_imported():
    """Sub-packages have the names of the ops; a fresh process imports every backend and asks what the names mean."""
    code = """
import kernels_pallas
from kernels_pallas import causal_conv1d, dispatch, gated_linear_attention, lawcat_attention
for name in dispatch.IMPLEMENTATIONS:
    dispatch.backward_module("gated_linear_attention", name)
    try:
        dispatch.forward_module("lawcat_attention", name)
    except LookupError:
        pass
import kernels_pallas.testing.cases, kernels_pallas.gated_linear_attention.scan, kernels_pallas.benchmark.suite
for op in (causal_conv1d, gated_linear_attention, lawcat_attention):
    assert callable(op) and getattr(kernels_pallas, op.__name__) is op, op
assert all(hasattr(kernels_pallas, name) for name in kernels_pallas.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_no_test_and_no_flax():
    code = """
import pkgutil, sys
import kernels_pallas
for module in pkgutil.walk_packages(kernels_pallas.__path__, "kernels_pallas."):
    if module.name.split(".")[-1] not in ("__main__", "tune"):  # these parse flags
        __import__(module.name)
found = sorted({name.split(".")[0] for name in sys.modules} & {"tests", "flax", "lawcat_jax", "torch"})
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)

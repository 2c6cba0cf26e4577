"""Calls as named leaves: binding, its inverse, and the signature that a plan is valid for."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcr_compile.arguments import (
    bind_arguments,
    bind_inputs,
    iterate_leaves,
    leaf_name,
    map_leaves,
    positional_names,
    signature_of,
    unbind_arguments,
    unbind_as,
)


class Module(torch.nn.Module):
    def forward(model, a: Any, b: Any = 1, *rest: Any, c: Any = 2, **others: Any) -> tuple[Any, ...]:
        return a, b, rest, c, others


call = Module()
NAMES = ("a", "b")


def test_positional_names_leave_the_module_out_however_it_is_called() -> None:
    assert positional_names(Module) == NAMES
    assert positional_names(torch.nn.Linear) == positional_names(torch.nn.Linear(2, 2)) == ("input",)


def test_inputs_are_those_of_a_forward_that_was_set_on_the_instance() -> None:
    model, x = torch.nn.Identity(), torch.zeros(1, 2)
    model.forward = types.MethodType(lambda module, tokens, timestep=0: tokens, model)  # type: ignore[method-assign]
    assert bind_inputs(model, ((x, 5), {})) == {"tokens": x, "timestep": 5}


@given(
    args=st.lists(st.integers(), min_size=1, max_size=5),
    kwargs=st.dictionaries(st.sampled_from(["c", "d", "e"]), st.integers()),
)
def test_unbinding_gives_the_same_call(args: list[int], kwargs: dict[str, int]) -> None:
    bound = bind_arguments(NAMES, tuple(args), kwargs)
    again_args, again_kwargs = unbind_arguments(NAMES, bound)
    assert call(*again_args, **again_kwargs) == call(*args, **kwargs)
    assert bind_arguments(NAMES, again_args, again_kwargs) == bound
    assert unbind_as(NAMES, bound, tuple(args), kwargs) == (tuple(args), kwargs)


def test_one_call_has_one_form_however_it_is_written() -> None:
    forms = [((1, 2), {"d": 3, "c": 4}), ((1,), {"c": 4, "b": 2, "d": 3}), ((), {"b": 2, "a": 1, "d": 3, "c": 4})]
    bound = [bind_arguments(NAMES, *form) for form in forms]
    assert [list(one.items()) for one in bound] == [[("a", 1), ("b", 2), ("c", 4), ("d", 3)]] * 3


def test_a_dictionary_of_inputs_is_put_in_the_forwards_order() -> None:
    inputs = {"d": 4, "b": 2, "a": 1}
    assert list(bind_inputs(call, inputs).items()) == [("a", 1), ("b", 2), ("d", 4)]


def test_an_argument_given_twice_is_refused_as_in_a_call() -> None:
    model, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    assert bind_inputs(model, ((x,), {})) == bind_inputs(model, ((), {"input": x})) == {"input": x}
    with pytest.raises(TypeError, match=r"Linear\.forward several values for 'input': by position, and by name"):
        bind_inputs(model, ((x,), {"input": x}))


def test_a_gap_among_the_positional_is_passed_by_name() -> None:
    assert unbind_arguments(NAMES, {"b": 2}) == ((), {"b": 2})


NESTED = {"a": [1, (2, None)], "b": {"x": 3, "y": []}}


def test_leaves_have_paths() -> None:
    assert dict(iterate_leaves(NESTED)) == {("a", 0): 1, ("a", 1, 0): 2, ("a", 1, 1): None, ("b", "x"): 3}


def test_mapping_keeps_the_containers() -> None:
    assert map_leaves(lambda path, leaf: leaf, NESTED) == NESTED
    assert map_leaves(lambda path, leaf: len(path), NESTED) == {"a": [2, (3, 3)], "b": {"x": 2, "y": []}}
    assert map_leaves(lambda path, leaf: leaf, NESTED) is not NESTED


def test_a_signature_knows_ranks_and_types_and_not_sizes() -> None:
    one = signature_of({"x": torch.zeros(2, 3), "scale": 1.0, "mask": None})
    assert one == ((("x",), 2), (("scale",), "float"))
    assert one == signature_of({"x": torch.zeros(5, 7), "scale": 2.0})
    assert one != signature_of({"x": torch.zeros(5, 7, 1), "scale": 2.0})
    assert one != signature_of({"x": torch.zeros(5, 7), "scale": 2.0, "mask": torch.zeros(1)})


@pytest.mark.parametrize(("path", "name"), [(("rope", 0), "rope_0"), (("*1",), "arg1"), (("a", "b-c"), "a_b_c")])
def test_names_are_identifiers(path: tuple[str | int, ...], name: str) -> None:
    assert leaf_name(path) == name
    assert name.isidentifier()

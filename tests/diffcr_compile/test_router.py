"""The router: no one else's layer, out of every state dict, seeded by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from diffcr_compile.router import Router


def make(fqn: str, num_regions: int | None = None) -> Router:
    return Router(16, fqn, dtype=torch.bfloat16, device=torch.device("cpu"), num_regions=num_regions)


def test_the_start_depends_on_the_name_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = make("blocks.0"), make("blocks.0"), make("blocks.1")
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_shape_are_the_blocks() -> None:
    weight = make("blocks.0").weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (16,))
    assert isinstance(weight, nn.Parameter)
    assert not isinstance(make("blocks.0"), nn.Linear)


def test_one_vector_for_each_region_starts_as_the_one_for_all() -> None:
    weight = make("blocks.0", 3).weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (3, 16))
    assert all(torch.equal(row, make("blocks.0").weight) for row in weight)


def test_state_dicts_know_nothing_of_it() -> None:
    module = nn.Linear(2, 2)
    keys = list(module.state_dict())
    module.add_module("diffcr_router", make("blocks.0"))
    assert list(module.state_dict()) == keys
    assert module.load_state_dict(nn.Linear(2, 2).state_dict(), strict=True).missing_keys == []
    assert "diffcr_router.weight" in dict(module.named_parameters())


def test_offload_by_the_state_dict_leaves_it_where_it_is() -> None:
    module = nn.Sequential(make("blocks.0"))
    router, weight = module[0], module[0].weight
    assert list(module.state_dict()) == []
    router._parameters["weight"] = nn.Parameter(weight.detach().to("meta"))
    router.forward = lambda x: x / 0
    assert router.weight is weight
    assert module(1) == 1


def test_it_goes_to_the_meta_device_with_its_model() -> None:
    module = nn.Sequential(make("blocks.0"), nn.Linear(2, 2))
    module.state_dict()
    assert all(parameter.is_meta for parameter in module.to("meta").parameters())


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "cast and to_empty": lambda module: module.bfloat16().to_empty(device="cpu"),
    "to": lambda module: module.to("cpu"),
}


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("trained", [False, True])
def test_it_has_its_values_when_it_leaves_the_meta_device(how: str, trained: bool) -> None:
    router = Router(16, "blocks.0", dtype=torch.bfloat16, device=torch.device("meta"))
    expected = make("blocks.0").weight
    if trained:
        router, expected = make("blocks.0"), torch.arange(16.0)
        router.fill(expected)
        router.to("meta")
    assert router.weight.is_meta
    router = MOVES[how](copy.deepcopy(router))
    assert torch.equal(router.weight, expected)
    router.fill(expected + 1)
    assert torch.equal(MOVES[how](router.to("meta")).weight, expected.to(router.weight.dtype) + 1)


def test_it_keeps_its_values_where_its_model_loses_them() -> None:
    router = make("blocks.0").to_empty(device="cpu").float()
    assert router.weight.dtype == torch.float32
    assert torch.equal(router.weight, make("blocks.0").weight.float())


def test_values_may_be_given_to_it_on_the_meta_device() -> None:
    router = Router(16, "blocks.0", dtype=torch.bfloat16, device=torch.device("meta"))
    router.fill(torch.arange(16.0))
    assert router.weight.is_meta
    assert torch.equal(router.to_empty(device="cpu").weight, torch.arange(16.0))

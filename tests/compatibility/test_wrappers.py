"""What is put around a routed model, or on it, at run time: rows 6 (guidance and steps), 7 (memory and training), 9 (caches)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.training_utils import EMAModel
from models import routed_fqns, same_snapshot, snapshot, tensors_of, watch_blocks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffcr_compile
from compatibility.matrix import (
    BATCH,
    LARGE,
    ORDER,
    ROUNDING,
    TINY,
    assert_bits,
    assert_close,
    assert_keeps,
    assert_routes,
    at_timestep,
    inputs,
    kept,
    one_sample,
    plain,
    refused,
    routed,
    row,
    run,
    table,
    transform_first,
)

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

CPU = torch.device("cpu")
Record = Callable[[str, object], None]

_NO_GROUPS = {"dit": "diffusers refuses group offload for its DiT"}


# Row 6


@row(6, "guidance: one batch of two halves, or two calls")
def test_guidance_in_one_call_equals_two(name: str) -> None:
    model = routed(name)
    diffcr_compile.set_ratios(model, table(model))
    both = at_timestep(name, inputs(name, 2 * BATCH), 0.6)
    halves = [
        {
            key: value[part] if isinstance(value, Tensor) and len(value) == 2 * BATCH else value
            for key, value in both.items()
        }
        for part in (slice(BATCH), slice(BATCH, None))
    ]
    together, apart = kept(model, both), [kept(model, half) for half in halves]
    for fqn, indices in together.items():
        assert torch.equal(indices, torch.cat([half[fqn] for half in apart]))
    assert min(indices.shape[1] for indices in together.values()) < TINY[name].tokens
    assert_close(run(model, both), torch.cat([run(model, half) for half in halves]))


@row(6, "samples of one batch at different timesteps")
def test_mixed_timesteps_equal_each_sample_alone(name: str) -> None:
    model, given = routed(name), inputs(name)
    diffcr_compile.set_ratios(model, table(model))
    steps = torch.tensor([0.9, 0.1, 0.6]) * (1 if name == "flux" else 1000)
    given["timestep"] = steps.to(given["timestep"].dtype)
    whole = run(model, given)
    ks = []
    for sample in range(BATCH):
        one = one_sample(given, sample)
        ks.append(tuple(indices.shape[1] for indices in kept(model, one).values()))
        assert_close(whole[sample : sample + 1], run(model, one))
    assert len(set(ks)) == BATCH


@row(6, "another num_inference_steps after transform")
def test_another_number_of_steps(name: str) -> None:
    """Each step of either length is the same as that step in a model that has run no other."""
    model, fresh = routed(name), routed(name)
    rows = table(model)
    for one in (model, fresh):
        diffcr_compile.set_ratios(one, rows)
    flow = name in ("sd3", "flux", "wan")
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
    for num_steps in (5, 3):
        scheduler.set_timesteps(num_steps)
        assert len(scheduler.timesteps) == num_steps
        for step in scheduler.timesteps:
            share = float(step) / 1000
            given = at_timestep(name, inputs(name), share)
            region = min(int(share * len(rows)), len(rows) - 1)
            expected = [TINY[name].tokens - int(TINY[name].tokens * ratio) for ratio in rows[region].tolist()]
            assert [indices.shape[1] for indices in kept(model, given).values()] == expected
            assert_bits(run(model, given), run(copy.deepcopy(fresh), given))


# Row 7


@row(7, "group offload by blocks, after transform", without=_NO_GROUPS)
def test_group_offload_after(name: str) -> None:
    expected, model = run(routed(name), inputs(name)), routed(name)
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)
    diffcr_compile.restore(model)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))


@row(7, "group offload by leaves, after transform", without=_NO_GROUPS)
def test_group_offload_of_leaves_after(name: str) -> None:
    expected, model = run(routed(name), inputs(name)), routed(name)
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)


@row(
    7,
    "group offload by blocks, before transform",
    without=_NO_GROUPS,
)
def test_group_offload_before(name: str, record_property: Record) -> None:
    model = plain(name)
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


@row(7, "group offload by leaves, before transform", without=_NO_GROUPS)
def test_group_offload_of_leaves_before(name: str, record_property: Record) -> None:
    model = plain(name)
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


@row(7, "model offload hook, before and after transform", slow=LARGE)
def test_model_offload(name: str) -> None:
    expected = run(routed(name, first=True), inputs(name))
    after = routed(name, first=True)
    accelerate.cpu_offload_with_hook(after, CPU)
    before = plain(name)
    accelerate.cpu_offload_with_hook(before, CPU)
    transform_first(before, name)
    for model in (after, before):
        assert_routes(name, model, first=True)
        assert_bits(run(model, inputs(name)), expected)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert_bits(run(model, inputs(name)), expected)


@row(7, "accelerate's hooks on blocks, after transform; taken off again")
def test_block_hooks_after(name: str) -> None:
    expected, model = run(routed(name), inputs(name)), routed(name)
    before = snapshot(model)
    for fqn in routed_fqns(model):
        hook = accelerate.hooks.AlignDevicesHook(execution_device=CPU, offload=True, io_same_device=True)
        accelerate.hooks.add_hook_to_module(model.get_submodule(fqn), hook)
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)
    for fqn in routed_fqns(model):
        accelerate.hooks.remove_hook_from_module(model.get_submodule(fqn))
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)
    assert list(before[1]) == list(model.state_dict())


@row(7, "accelerate's hooks on blocks, before transform", slow=LARGE)
def test_block_hooks_before(name: str, record_property: Record) -> None:
    model = plain(name)
    for index in range(TINY[name].family):
        block = model.get_submodule(f"{TINY[name].first}{index}")
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.AlignDevicesHook(CPU, io_same_device=True))
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


@row(7, "cost of a model with group offload", without=_NO_GROUPS)
def test_cost_with_group_offload(name: str) -> None:
    model = routed(name)
    expected = diffcr_compile.cost(model, inputs(name, 2))
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    assert diffcr_compile.cost(model, inputs(name, 2)) == expected


@row(7, "cost of a model with accelerate's hooks on blocks")
def test_cost_with_block_hooks(name: str) -> None:
    model = routed(name)
    expected = diffcr_compile.cost(model, inputs(name, 2))
    for fqn in routed_fqns(model):
        hook = accelerate.hooks.AlignDevicesHook(execution_device=CPU, offload=True, io_same_device=True)
        accelerate.hooks.add_hook_to_module(model.get_submodule(fqn), hook)
    assert diffcr_compile.cost(model, inputs(name, 2)) == expected


@row(7, "sequential offload of every module, after transform; taken off again")
def test_sequential_offload_after(name: str) -> None:
    expected, cost, model = run(routed(name), inputs(name)), diffcr_compile.cost(routed(name)), routed(name)
    keys = list(model.state_dict())
    accelerate.cpu_offload(model, CPU)
    blocks = [model.get_submodule(fqn) for fqn in routed_fqns(model)]
    assert all(part.is_meta for block in blocks for key, part in block.named_parameters() if "diffcr_router" not in key)
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)
    assert diffcr_compile.cost(model) == cost
    assert list(model.state_dict()) == keys
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_bits(run(model, inputs(name)), expected)


@row(7, "sequential offload of every module, before transform")
def test_sequential_offload_before(name: str, record_property: Record) -> None:
    model = plain(name)
    accelerate.cpu_offload(model, CPU)
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


@row(7, "sequential offload of every module, after transform with full context", slow=LARGE)
def test_sequential_offload_with_full_context(name: str, record_property: Record) -> None:
    config = diffcr_compile.DiffCRConfig(context="all")
    model = diffcr_compile.transform(plain(name), config, example_inputs=inputs(name))
    diffcr_compile.set_ratios(model, 0.5)
    accelerate.cpu_offload(model, CPU)
    message = refused(record_property, run, model, inputs(name))
    assert "offload" in message
    assert "use context='kept'" in message


CASTING = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}


@row(7, "layerwise casting to float8 storage, after transform")
def test_layerwise_casting_after(name: str) -> None:
    """The values are those of a routed model whose weights went through float8 by themselves."""
    model, dense = routed(name), plain(name)
    for one in (model, dense):
        one.enable_layerwise_casting(**CASTING)
    stored = dense.state_dict()
    assert any(value.dtype == torch.float8_e4m3fn for value in stored.values())
    assert {key: value.dtype for key, value in model.state_dict().items()} == {
        key: value.dtype for key, value in stored.items()
    }
    assert {model.get_submodule(fqn).diffcr_router.weight.dtype for fqn in routed_fqns(model)} == {torch.float32}
    expected = routed(name)
    expected.load_state_dict({key: value.float() for key, value in stored.items()})
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), run(expected, inputs(name)))


@row(7, "layerwise casting to float8 storage, before transform", slow=LARGE)
def test_layerwise_casting_before(name: str, record_property: Record) -> None:
    model, dense = plain(name), plain(name)
    for one in (model, dense):
        one.enable_layerwise_casting(**CASTING)
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(dense, inputs(name)))
    assert ORDER in message


def _gradients(model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and its gradients by name; labels are dropped alike at each call."""
    torch.manual_seed(0)
    loss = tensors_of(model(**given))[0].square().mean()
    loss.backward()
    return loss.detach(), {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@row(7, "gradient checkpointing: loss and gradients")
def test_gradient_checkpointing(name: str) -> None:
    model, given = routed(name).train(), at_timestep(name, inputs(name), 0.6)
    other = copy.deepcopy(model)
    other.enable_gradient_checkpointing()
    loss, gradients = _gradients(model, given)
    other_loss, other_gradients = _gradients(other, given)
    assert any(module.gradient_checkpointing for module in other.modules() if hasattr(module, "gradient_checkpointing"))
    assert torch.equal(loss, other_loss)
    assert list(gradients) == list(other_gradients)
    assert {f"{fqn}.diffcr_router.weight" for fqn in routed_fqns(model)} <= set(gradients)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[key])


@row(7, "gradient checkpointing before transform: loss and gradients", slow=LARGE)
def test_gradient_checkpointing_before(name: str) -> None:
    model, given = plain(name), at_timestep(name, inputs(name), 0.6)
    model.enable_gradient_checkpointing()
    transform_first(model, name)
    assert_routes(name, model, first=True)
    loss, gradients = _gradients(model.train(), given)
    other_loss, other_gradients = _gradients(routed(name, first=True).train(), given)
    assert torch.equal(loss, other_loss)
    assert set(gradients) == set(other_gradients)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[key])


@row(7, "gradient checkpointing while learning")
def test_gradient_checkpointing_while_learning(name: str) -> None:
    model, given = routed(name).train(), at_timestep(name, inputs(name), 0.6)
    diffcr_compile.set_ratios(model, table(model))
    other = copy.deepcopy(model)
    other.enable_gradient_checkpointing()
    found = []
    for one in (model, other):
        with diffcr_compile.learning(one) as learnable:
            found.append((*_gradients(one, given), learnable.ratios.grad))
    (loss, gradients, ratios), (other_loss, other_gradients, other_ratios) = found
    assert torch.equal(loss, other_loss)
    assert bool(ratios.any())
    assert torch.equal(ratios, other_ratios)
    assert list(gradients) == list(other_gradients)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[key])


@row(7, "copies for an EMA have a routing of their own")
def test_ema_copies(name: str) -> None:
    model = routed(name)
    average = torch.optim.swa_utils.AveragedModel(model)
    diffcr_compile.set_ratios(model, 0.25)
    assert_routes(name, average.module)
    assert diffcr_compile.ratios(model).unique().tolist() == [0.25]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    average.update_parameters(model)
    average.update_parameters(model)  # the first call copies
    reference = copy.deepcopy(model)
    diffcr_compile.set_ratios(reference, 0.5)
    assert_close(run(average.module, inputs(name)), run(reference, inputs(name)))
    diffcr_compile.restore(model)
    assert_routes(name, average.module)


@row(7, "diffusers' EMAModel over the parameters")
def test_ema_of_parameters(name: str) -> None:
    model, given = routed(name), inputs(name)
    before = run(model, given)
    ema = EMAModel(model.parameters(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    moved = run(model, given)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert_bits(run(model, given), before)
    assert_routes(name, model)
    ema.restore(model.parameters())
    assert_bits(run(model, given), moved)


@row(7, "state dict through torch.save, into routed and plain models")
def test_state_dict_is_pickled(name: str) -> None:
    model, given = routed(name), inputs(name)
    expected = run(model, given)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    weights = torch.load(buffer, weights_only=True)
    dense, other = plain(name), routed(name)
    assert list(weights) == list(dense.state_dict())
    with torch.no_grad():
        for parameter in (*dense.parameters(), *(other.state_dict().values())):
            parameter.zero_()
    dense.load_state_dict(weights, strict=True)
    other.load_state_dict(weights, strict=True)
    assert_bits(run(dense, given), run(plain(name), given))
    assert_bits(run(other, given), expected)
    assert_routes(name, other)


@row(7, "a routed model pickled whole")
def test_pickling_whole(name: str, record_property: Record) -> None:
    message = refused(record_property, pickle.dumps, routed(name))
    assert "state_dict and its routing by diffcr_compile.save" in message


# Row 9


_NO_CACHE = {"sd3": "diffusers' cache fails on its last block, which returns no text, dense too"}


def _cached(model: nn.Module, threshold: float) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
    _set_cache_context(model, CacheContext("cond"))


@row(9, "FirstBlockCache that never hits, after transform", without=_NO_CACHE)
def test_first_block_cache_without_hits(name: str) -> None:
    model, expected = routed(name), routed(name)
    _cached(model, -1.0)
    for share in (0.9, 0.6, 0.3):
        given = at_timestep(name, inputs(name), share)
        assert_bits(run(model, given), run(expected, given))
    assert_routes(name, model)


@row(9, "FirstBlockCache that hits, after transform", without=_NO_CACHE)
def test_first_block_cache_with_hits(name: str) -> None:
    """At the second step the first block runs, routed, and all others leave the update of the first step."""
    model, reference = routed(name), routed(name)
    _cached(model, 1e9)
    first, second = (at_timestep(name, inputs(name), share) for share in (0.9, 0.85))
    fqns = routed_fqns(model)
    assert_bits(run(model, first), run(reference, first))
    with diffcr_compile.trace(model) as seen:
        found = run(model, second)
    tokens = TINY[name].tokens
    assert [len(seen.kept[fqn]) for fqn in fqns] == [1] + [0] * (len(fqns) - 1)
    assert seen.kept[fqns[0]][0].shape[1] == tokens - tokens // 2
    assert_close(found, _reused(name, reference, first, second))


def _reused(name: str, model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> Tensor:
    """What FirstBlockCache computes at the second step, by hooks of our own on a routed model without it."""
    fqns = routed_fqns(model)
    with torch.no_grad(), watch_blocks(model, fqns) as calls:
        model(**first)
    head, tail = (tensors_of(call.output) for call in (calls[0], calls[-1]))
    updates = [after - before for before, after in zip(head, tail, strict=True)]
    handles = []
    for fqn in fqns[1:]:
        handles.append(model.get_submodule(fqn).register_forward_hook(_pass_on, with_kwargs=True))
    found: list[Tensor] = []
    handles.append(model.get_submodule(fqns[0]).register_forward_hook(lambda *call: _add(call[-1], updates)))
    try:
        found.append(run(model, second))
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A block's inputs in the place of its outputs."""
    given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
    if isinstance(output, Tensor):
        return given["hidden_states"]
    return tuple(given[key] for key in ("encoder_hidden_states", "hidden_states"))


def _add(output: Any, updates: list[Tensor]) -> Any:
    if isinstance(output, Tensor):
        return output + updates[0]
    return tuple(one + update for one, update in zip(output, updates, strict=True))


@row(9, "FirstBlockCache before transform", without=_NO_CACHE, slow=LARGE)
def test_first_block_cache_before(name: str, record_property: Record) -> None:
    model = plain(name)
    _cached(model, -1.0)
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


_NO_REPEATED = dict.fromkeys(("dit", "pixart", "sd3"), "the class lists no _repeated_blocks")


@row(9, "compile_repeated_blocks after transform", without=_NO_REPEATED, slow=LARGE)
def test_compile_repeated_blocks_after(name: str) -> None:
    torch._dynamo.reset()
    model, given = routed(name), inputs(name)
    expected = run(model, given)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert_close(run(model, given), expected, ROUNDING)
    assert counter.frame_count > 0
    assert_keeps(name, model)


@row(
    9,
    "compile_repeated_blocks before transform",
    without=_NO_REPEATED,
    slow=LARGE,
)
def test_compile_repeated_blocks_before(name: str) -> None:
    """Run dense before, so that dense graphs are there to be taken by mistake."""
    torch._dynamo.reset()
    model, given = plain(name), inputs(name)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    dense = run(model, given)
    graphs, before = counter.frame_count, snapshot(model)
    transform_first(model, name)
    assert_close(run(model, given), run(routed(name, first=True), given), ROUNDING)
    assert counter.frame_count > graphs > 0
    diffcr_compile.restore(model)
    assert_close(run(model, given), dense)
    assert same_snapshot(snapshot(model), before)

"""What a graph rewritten for full context belongs to: one state of a block's modules."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from models import Shape, original, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile.context import context_key


def block() -> nn.Module:
    return original(Shape("plain", depth=1, heads=1, head_dim=6)).blocks[0]


def test_layers_of_one_kind_share_a_key() -> None:
    assert context_key(block()) == context_key(copy.deepcopy(block()))


def test_what_changes_the_modules_changes_the_key() -> None:
    before = context_key(block())
    halved, training, replaced, hooked = block().half(), block().train(), block(), block()
    replaced.stream.out = nn.Sequential(replaced.stream.out)
    hooked.stream.out.register_forward_hook(lambda module, args, output: output)
    assert len({before, *(context_key(changed) for changed in (halved, training, replaced, hooked))}) == 5


def test_a_processor_or_a_switch_set_on_a_module_changes_the_key() -> None:
    class Processor:
        pass

    modules = [block() for _ in range(7)]
    _, processed, switched, scaled, weaker, scaling, disabled = modules
    processed.stream.processor = Processor()
    switched.stream.causal = True
    scaled.stream.gain, weaker.stream.gain = 1.0, 0.5
    scaling.stream.scaling = {"default": 0.25}
    disabled.stream._disable_adapters = True
    assert len({context_key(module) for module in modules}) == len(modules)


def test_what_a_callable_on_a_module_holds_is_in_the_key() -> None:
    """Of partial functions, bound methods, and objects with slots, of which nothing lies in a dictionary."""

    class Slotted:
        __slots__ = ("by",)

        def __init__(self, by: float) -> None:
            self.by = by

        def double(self, x: float) -> float:
            return 2 * x * self.by

        def triple(self, x: float) -> float:
            return 3 * x * self.by

    one, two = Slotted(1.0), Slotted(2.0)
    scale = Slotted.double
    settings = (
        one,
        two,
        functools.partial(scale, x=1.0),
        functools.partial(scale, x=2.0),
        one.double,
        one.triple,
        two.double,
    )
    keys = []
    for value in settings:
        module = block()
        module.stream.gain = value
        keys.append(context_key(module))
    assert len(set(keys)) == len(settings)


def test_another_hook_in_the_place_of_one_changes_the_key() -> None:
    module = block()
    handle = module.stream.out.register_forward_hook(lambda module, args, output: output + 1)
    before = context_key(module)
    handle.remove()
    kept = module.stream.out.register_forward_hook(lambda module, args, output: output + 2)
    assert context_key(module) != before
    assert kept is not handle


def test_a_hook_without_room_for_weak_references_has_a_key() -> None:
    class Bare:
        __slots__ = ()

        def __call__(self, *args: object) -> None: ...

    module = block()
    module.stream.out.register_forward_hook(Bare())
    assert context_key(module) == context_key(module) != context_key(block())


def test_weights_and_the_blocks_own_hooks_do_not() -> None:
    changed = block()
    with torch.no_grad():
        changed.stream.out.weight.mul_(2)
    changed.register_forward_pre_hook(lambda module, args: None)
    assert context_key(changed) == context_key(block())


def test_a_graph_that_makes_tensors_is_proved_wherever_its_block_lies() -> None:
    """On the meta device as on the CPU: what the export saw is not what the proof runs on."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
            bias = torch.zeros(1, 1, 1, x.shape[1], device=x.device)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(1)
            return x + self.out(attended)

    for device in ("cpu", "meta"):
        with torch.device(device):
            model, inputs = nn.Sequential(Padded(), Padded(), Padded()), torch.randn(2, 11, 8)
        diffcr_compile.transform(model, diffcr_compile.DiffCRConfig(context="all"), example_inputs={"input": inputs})
        (plan,) = diffcr_compile.explain(model).plan.families
        assert (plan.context, plan.context_note) == ("all", "")


def test_complex_tensors_are_in_the_key() -> None:
    turned, other = block(), block()
    turned.table, other.table = (torch.polar(torch.ones(3), torch.arange(3.0) + start) for start in (0.0, 0.1))
    assert context_key(turned) != context_key(other)
    assert context_key(turned) == context_key(copy.deepcopy(turned))


def test_a_block_first_routed_in_the_midst_of_a_sampling_runs_as_its_modules_are() -> None:
    class Scaled(type(block())):  # type: ignore[misc]
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return x + self.share * (super().forward(x, *rest) - x)

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model = original(shape)
    for each in model.blocks:
        each.__class__, each.share = Scaled, 1.0
    diffcr_compile.transform(model, diffcr_compile.DiffCRConfig(skip="reuse"), example_inputs=tiny_inputs(shape))
    model.blocks[1].share = 0.0  # before anything has run
    table = torch.full(diffcr_compile.ratios(model).shape, 0.5)
    table[:, 1] = 0.0
    diffcr_compile.set_ratios(model, table)
    changes = []
    model.blocks[1].register_forward_hook(lambda _, args, output: changes.append(float((output - args[0]).abs().max())))
    with torch.no_grad():
        for step in (900.0, 800.0, 700.0):
            model(**tiny_inputs(shape, timestep=step))
            diffcr_compile.set_ratios(model, 0.5)
    assert changes == [0.0] * 3

"""Context from every token: rewrite a block's own graph so that skipped tokens still give keys and values.

Before, on the kept tokens alone (``program.py``)::

    out = attend(q(x_kept), k(x_kept), v(x_kept))

After, on all tokens where keys and values ask for them, on the kept ones everywhere else::

    normed = norm(x)                              # keys and values need it: for all tokens
    out = attend(q(take(normed)), k(normed), v(normed))

Every node of the exported graph has two values, *full* and *kept*; each is written when something asks for it. Keys, values
and the columns of masks ask for full; queries and outputs for kept. Where the full value is there anyway it is indexed, else
the node is run on the kept values of its operands; sizes follow, being nodes themselves. A kept token then comes out as from the
dense block, which ``prove_context`` holds the result to.

With stale context nothing is computed for all: keys and values are those of the kept tokens, put among what the memory holds of
the others, and go back into it::

    k_new = k(norm(x_kept))
    out = attend(q(norm(x_kept)), put(k_old, k_new), put(v_old, v_new))

A second graph, the block as it is with its keys and values for further outputs, runs where the block runs dense.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export import ExportedProgram

from .. import primitives
from ..arguments import map_leaves
from ..context import ContextGraph, open_settings
from ..defaults import as_written, autocast_dtype, without_autocast
from ..plan import BlockPlan, StatePlan
from ..routed import has_quantised_weights
from .analysis import Call, Refused, TensorInfo, describe, log
from .block import BlockAnalysis
from .export import duplicate, export_block, guards_of
from .residual import ancestors
from .tokens import plan_leaves, plan_state, token_axis_of
from .verify import Trial, first_line

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default
_SPLITS = (_aten.split_with_sizes.default, _aten.split.Tensor, _aten.tensor_split.indices)
_QUERY_FIRST = {_aten.matmul.default: 0, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
"""Products with the position of the factor whose rows are queries, or attention weights; what follows it is keys or values."""


def prove_context(block: BlockAnalysis) -> BlockAnalysis:
    """Where the configuration asks for context from every token: fill in ``context_graph`` and the plan's context, or the reason
    why not.

    Proved like the routed program itself: at batch three, other tokens for each sample, random parameters; every kept token equals
    the dense block's result at that token, where what is remembered is of the same tokens. In float32, whatever the block's own
    dtype: its graph holds the dtypes that it casts to, so that of a narrow block is written a second time for the proof.
    """
    if block.config.context == "kept":
        return block
    assert block.plan is not None
    try:
        return _prove(block, _outside_autocast(block))
    except Refused as refused:
        note = f"keys and values from kept tokens only: {refused}"
        log.info("%s: %s", block.fqn, note)
        return replace(block, plan=replace(block.plan, context_note=note))


@as_written()
def _prove(block: BlockAnalysis, source: BlockAnalysis) -> BlockAnalysis:
    """``source``: the block as its graph is read."""
    plan = block.plan
    assert plan is not None
    trial = Trial(block)
    graph, states = write_context(source)
    proof = graph
    if _is_narrow(block.module, [leaf for _, leaf in source.call_leaves]):
        proof, _ = write_context(_widened(duplicate(block), block))
    failures = []
    for form in dict.fromkeys((plan.lift, "vmap", "loop") if plan.lift != "direct" else (plan.lift,)):
        candidate = replace(plan, context=block.config.context, states=states, lift=form)
        try:
            error = trial.check_context(candidate, proof)
            plan = replace(candidate, error=max(error, plan.error))
            return replace(block, plan=plan, context_graph=graph, context_proof=proof)
        except Exception as error:  # a form that does not fit raises whatever the block's code does
            failures.append(f"{form}: {first_line(error)}")
    raise Refused("; ".join(failures))


@as_written()
def prove_same_context(block: BlockAnalysis) -> None:
    """Refuses a block for which the graph of the one it is a neighbour of, whose analysis it carries, is not right: an export
    writes the numbers that a module holds into the graph."""
    if block.context_proof is not None:
        assert block.plan is not None
        Trial(block).check_context(block.plan, block.context_proof)


def rebuild_context(
    module: nn.Module, fqn: str, plan: BlockPlan, values: list[Any], config: Any, *, proved: bool = False
) -> ContextGraph:
    """The graph for a block whose modules, dtypes or device have changed since its plan was proved; raises Refused.

    proved: as in the analysis, for a plan that was loaded, or sizes of which no graph is; but not in training, where dropout has no
    two runs alike, nor where hooks stand around forwards and move weights, or these are quantised and can't be drawn at random.
    Written outside any fake tensors around the call: the graph is kept for calls that are real.
    """
    cast = _autocast_dtype(module)
    with unset_fake_temporarily(), contextlib.nullcontext() if cast is None else without_autocast():
        leaves = [_describe(value, leaf.batch_axis) for value, leaf in zip(values, plan.leaves, strict=True)]
        leaves = leaves if cast is None else _uncast(leaves, cast)
        block = _read(module, fqn, plan, leaves, config)
        proved = proved or [leaf.batch_axis for leaf in block.leaves] != [leaf.batch_axis for leaf in plan.leaves]
        block = replace(block, leaves=plan.leaves)
        graph, states = write_context(block)
        if list(map(_fixed_sizes, states)) != list(map(_fixed_sizes, plan.states)):
            raise Refused("its keys and values have other shapes than those that are remembered")
        parts = [part for part in module.modules() if part is not module]
        fixed = has_quantised_weights(module) or any(part.training or "forward" in vars(part) for part in parts)
        if proved and not fixed:
            _prove_rewritten(duplicate(block), fqn, plan, leaves, config)
    return graph


def _read(module: nn.Module, fqn: str, plan: BlockPlan, leaves: list[Any], config: Any) -> BlockAnalysis:
    """The analysis of a block that has a plan, as far as its graph is to be rewritten. Refuses one with another plan."""
    arguments = map_leaves(lambda _, index: None if index is None else leaves[index], plan.arguments)
    call = Call(fqn, arguments, plan.output_template, 0)
    block = BlockAnalysis(module, fqn, call, config, attention=plan.attention, is_branch=plan.is_branch)
    block = export_block(block, as_it_is=True)
    dims = block.leaf_dims[plan.stream]
    token, batch = dims[plan.token_axis], dims[plan.batch_axis]
    block = replace(block, token_symbols=frozenset(token.free_symbols))
    block = plan_leaves(replace(block, stream=plan.stream, token=token, batch=batch))
    for found, known in zip(block.leaves, plan.leaves, strict=True):
        # what is broadcast over the samples may have a batch axis of its own in one dtype and not in another
        if found.token_axes != known.token_axes or found.batch_axis not in (None, known.batch_axis):
            raise Refused(f"its input {known.name!r} follows the tokens in another way")
    return block


@as_written()
def _prove_rewritten(module: nn.Module, fqn: str, plan: BlockPlan, leaves: list[Any], config: Any) -> None:
    """Refuses a block whose rewritten graph is not right at these sizes; in float32, as in :func:`prove_context`."""
    try:
        block = _read(_in_float32(module), fqn, plan, _as_float32(leaves), config)
        Trial(block).check_context(plan, write_context(block)[0])
    except Exception as error:  # whatever the block's code does
        raise Refused(first_line(error)) from error


def _autocast_dtype(module: nn.Module) -> torch.dtype | None:
    """What the user's autocast casts a float32 block's operands to, None without. Its graph is written outside, and holds none of
    these casts: it serves both, where one that holds them would serve only that autocast."""
    parameter = next(module.parameters(), None)
    kind = "cpu" if parameter is None or parameter.is_meta else parameter.device.type
    return None if _is_narrow(module, []) else autocast_dtype(kind)


def _outside_autocast(block: BlockAnalysis) -> BlockAnalysis:
    """The analysis of a block as it would be without the user's autocast."""
    cast = _autocast_dtype(block.module)
    if cast is None:
        return block
    assert block.plan is not None
    with without_autocast():
        leaves = _uncast([leaf for _, leaf in block.call_leaves], cast)
        return _read(duplicate(block), block.fqn, block.plan, leaves, block.config)


def _uncast(leaves: list[Any], cast: torch.dtype) -> list[Any]:
    """Leaves of a call as the block would have been given them without autocast."""
    narrow = [isinstance(leaf, TensorInfo) and leaf.dtype == cast for leaf in leaves]
    return [TensorInfo(leaf.shape, torch.float32) if was else leaf for leaf, was in zip(leaves, narrow, strict=True)]


def _is_narrow(module: nn.Module, leaves: list[Any]) -> bool:
    """Whether a block computes in another dtype than float32, as far as its parameters and the leaves of its call tell."""
    dtypes = [parameter.dtype for parameter in module.parameters()]
    dtypes += [leaf.dtype for leaf in leaves if isinstance(leaf, TensorInfo)]
    return any(dtype.is_floating_point and dtype != torch.float32 for dtype in dtypes)


def _widened(module: nn.Module, block: BlockAnalysis) -> BlockAnalysis:
    """The analysis of a float32 copy of a block's module, on float32 inputs."""
    assert block.plan is not None
    leaves = _as_float32([leaf for _, leaf in block.call_leaves])
    return _read(_in_float32(module), block.fqn, block.plan, leaves, block.config)


def _in_float32(module: nn.Module) -> nn.Module:
    """A module, or where it is not of float32 a copy that is: on the CPU, whose memory is not what a large model fills (on the meta
    device where its tensors are there)."""
    if not _is_narrow(module, []):
        return module
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
        wide = torch.empty_like(tensor, dtype=dtype) if tensor.is_meta else tensor.detach().to("cpu", dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(wide, requires_grad=tensor.requires_grad) if is_parameter else wide
    return copy.deepcopy(module, memo)


def _as_float32(leaves: list[Any]) -> list[Any]:
    return [
        TensorInfo(leaf.shape, torch.float32) if isinstance(leaf, TensorInfo) and leaf.dtype.is_floating_point else leaf
        for leaf in leaves
    ]


def _fixed_sizes(state: StatePlan) -> StatePlan:
    """The same, however the length along its tokens is written."""
    return replace(state, dims=tuple("" if axis == state.tokens.axis else size for axis, size in enumerate(state.dims)))


def _describe(value: Any, batch_axis: int | None) -> Any:
    """A leaf of a call as it is kept; a single sample is given twice, since a size of one would be taken for fixed."""
    info = describe(value)
    if batch_axis is None or info.shape[batch_axis] != 1:
        return info
    shape = tuple(2 if axis == batch_axis else size for axis, size in enumerate(info.shape))
    return TensorInfo(shape, info.dtype, None if info.value is None else torch.cat([info.value] * 2, batch_axis))


def write_context(block: BlockAnalysis) -> tuple[ContextGraph, tuple[StatePlan, ...]]:
    """The rewritten graph, and what it remembers. Refuses graphs with operators that write in place, or whose tokens can't be told
    apart."""
    assert block.program is not None
    program = block.program
    if _writes(program.graph):
        program = program.run_decompositions({})
        if _writes(program.graph):
            raise Refused("its graph writes into its inputs")
    return _Writer(block, program).write()


def _part_of(module: nn.Module, name: str, known: Collection[str]) -> str:
    """Where a plain tensor of a quantised parameter, which decomposition names by its number, is found on the module: by the
    attribute of the parameter that holds it."""
    owner, _, rest = name.rpartition(".parametrizations.")
    attribute, _, number = rest.rpartition(".original")
    parameter = f"{owner}.{attribute}" if owner else attribute
    if parameter not in known or not number.isdecimal():
        raise Refused(f"export took its parameters apart, so the graph can't share them ({name})")
    return f"{parameter}.{_plain_tensors(operator.attrgetter(parameter)(module))[int(number)]}"


def _plain_tensors(tensor: Any) -> list[str]:
    """Paths of the plain tensors that a tensor of a class of its own is made of, in the order in which torch flattens it."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [""]
    names, _ = tensor.__tensor_flatten__()
    return [f"{name}.{inner}".rstrip(".") for name in names for inner in _plain_tensors(getattr(tensor, name))]


def _writes(graph: fx.Graph) -> bool:
    return any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )


class _Writer:
    """Writes the graph on demand; ``full`` and ``kept`` give a node's two values."""

    def __init__(self, block: BlockAnalysis, program: ExportedProgram) -> None:
        self.block, self.source = block, program.graph
        self.graph = fx.Graph()
        self._full: dict[fx.Node, Any] = {}
        self._kept: dict[fx.Node, Any] = {}
        self._across: dict[fx.Node, Any] = {}
        self._places: dict[Any, fx.Node] = {}
        signature = program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise Refused("its graph writes into its inputs or buffers")
        nodes = {node.name: node for node in program.graph.nodes}
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        known = {name for name, _ in (*block.module.named_parameters(), *block.module.named_buffers())}
        names = (name.removeprefix("block.") for name in held.values())
        self.attributes = tuple(name if name in known else _part_of(block.module, name, known) for name in names)
        self.constants = tuple(program.constants[name] for name in signature.inputs_to_lifted_tensor_constants.values())
        for name in (*held, *signature.inputs_to_lifted_tensor_constants):
            self._full[nodes[name]] = self.graph.placeholder(name)
        self.positions = self.graph.placeholder("kept")
        self.outputs = [nodes[name] for name in signature.user_outputs if name is not None]
        self._place_leaves([nodes[name] for name in signature.user_inputs if name is not None])
        self.following = self._find_following()
        computed, remembered = self._find_asked()
        self.asked_full = ancestors(computed)
        self._place_states(remembered)

    def _place_leaves(self, inputs: list[fx.Node]) -> None:
        remaining = iter(inputs)
        tensors = [
            (leaf, next(remaining)) for leaf, (_, info) in zip(self.block.leaves, self.block.call_leaves, strict=True)
            if isinstance(info, TensorInfo)
        ]  # fmt: skip
        self.leaf_nodes: dict[int, fx.Node] = {}
        for leaf, node in tensors:
            self._full[node] = self.graph.placeholder(leaf.name)
            self.leaf_nodes[self.block.leaves.index(leaf)] = self._full[node]
        self.given = dict(self._full)
        for leaf, node in tensors:
            self._kept[node] = self.graph.placeholder(f"{leaf.name}_kept") if leaf.token_axes else self._full[node]
        self.moving = {node for leaf, node in tensors if leaf.token_axes}

    def _place_states(self, remembered: list[fx.Node]) -> None:
        self.states = {node: plan_state(self.block, self.block.dims(node), node.name) for node in remembered}
        self.held = {node: self.graph.placeholder(f"{node.name}_held") for node in remembered}

    def write(self) -> tuple[ContextGraph, tuple[StatePlan, ...]]:
        results = [
            self.kept(node) if plan.routed else self.full(node)
            for node, plan in zip(self.outputs, self.block.outputs, strict=True)
        ]
        self.graph.output((*results, *(self.kept(node) for node in self.states)))
        self.graph.lint()
        graph = fx.GraphModule({}, self.graph, class_name="Context")
        given = open_settings(leaf for _, leaf in self.block.call_leaves if not isinstance(leaf, TensorInfo))
        guards = guards_of(self.block, {leaf.path: leaf.batch_axis for leaf in self.block.leaves})
        context = ContextGraph(graph, self.attributes, self.constants, given, guards, self._write_fill())
        return context, tuple(self.states.values())

    def _write_fill(self) -> fx.GraphModule | None:
        """The block as it is, with what is to be remembered of all tokens for further outputs."""
        if not self.states:
            return None
        graph = fx.Graph()
        copies = {node: graph.placeholder(known.name) for node, known in self.given.items()}
        results = [*self.outputs, *self.states]
        needed = ancestors(results)
        for node in self.source.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in results))
        graph.lint()
        return fx.GraphModule({}, graph, class_name="Fill")

    def full(self, node: fx.Node) -> Any:
        """The node's value for all tokens."""
        if node not in self._full:
            self._full[node] = self._copy(node, self.kept if self._is_beside(node) else self.full)
        return self._full[node]

    def kept(self, node: fx.Node) -> Any:
        """The node's value for the kept tokens: in a product of queries with keys, the rows."""
        if node not in self.following:
            return self.full(node)
        if node not in self._kept:
            self._kept[node] = self._write_kept(node)
        return self._kept[node]

    def across(self, node: fx.Node) -> Any:
        """Keys or values of all tokens: computed, or remembered but for those of the kept ones."""
        if node not in self.states:
            return self.full(node)
        if node not in self._across:
            fresh, place = self.kept(node), self._token_place(node)
            assert place is not None
            axis, batch_axis, size = place
            held = self.graph.call_method("to", (self.held[node], fresh))
            args = (held, self._positions(axis, size), fresh, axis, batch_axis)
            self._across[node] = self.graph.call_function(primitives.put_tokens, args)
        return self._across[node]

    def _write_kept(self, node: fx.Node) -> Any:
        target = node.target
        dims = self._dims(node)
        if target is _SDPA:
            operands: list[Any] = list(node.args)
            if operands[5:] and operands[5]:
                raise Refused("causal attention: its queries have places")
            parts = [self.kept(operands[0]), *map(self.across, operands[1:3]), *map(self._rows, operands[3:4])]
            args = (*parts, *operands[4:])
            kwargs = {name: self._rows(arg) if name == "attn_mask" else arg for name, arg in node.kwargs.items()}
            return self._emit(node, args, kwargs)
        if dims is not None and not any(map(self._holds_tokens, dims)):
            return self.full(node)
        if target in _QUERY_FIRST and self._mixes(node):
            split = _QUERY_FIRST[target] + 1
            queries, keys = node.args[:split], node.args[split:]
            args = (*fx.map_arg(queries, self.kept), *fx.map_arg(keys, self.across))
            return self._emit(node, args, dict(node.kwargs))
        if node in self.asked_full and (place := self._token_place(node)) is not None:
            return self._take(self.full(node), *place)
        if dims is not None and self._is_table(dims):
            return self._copy(node, self._in_table)
        return self._copy(node, self.kept)

    def _is_beside(self, node: fx.Node) -> bool:
        """Whether a value is the part of a joint sequence without its tokens (the text): cut from the kept rows it is the same, and
        the rows of skipped tokens need not be computed for it."""
        whole: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(whole, fx.Node) and whole.target in _SPLITS:
            whole = whole.args[0]
        elif node.target is not _aten.slice.Tensor:
            return False
        dims, joint = self._dims(node), self._dims(whole)
        if dims is None or joint is None or whole in self.asked_full or whole not in self.following:
            return False
        holds = [any(map(self._holds_tokens, sizes)) for sizes in (dims, joint)]
        return holds == [False, True]

    def _mixes(self, node: fx.Node) -> bool:
        """Whether a product contracts over tokens, or has keys for columns."""
        place = _QUERY_FIRST[node.target]  # type: ignore[index]
        contracted = self._dims(node.args[place])[-1]
        return any(map(self._holds_tokens, (contracted, self._dims(node)[-1])))

    def _is_table(self, dims: Any) -> bool:
        """Whether a value has queries for rows and keys for columns."""
        return len(dims) >= 2 and all(map(self._holds_tokens, dims[-2:]))

    def _in_table(self, operand: fx.Node) -> Any:
        """An operand of a table of queries and keys: rows kept, columns full."""
        dims = self._dims(operand)
        if operand in self.following and dims is not None and self._is_table(dims) and operand.op != "placeholder":
            return self.kept(operand)
        return self._rows(operand)

    def _rows(self, operand: Any) -> Any:
        """Full columns and kept rows of a mask."""
        if not isinstance(operand, fx.Node) or operand not in self.following:
            return self.full(operand) if isinstance(operand, fx.Node) else operand
        dims = self._dims(operand)
        if dims is None or len(dims) < 2 or self.block.token not in dims[-2].free_symbols:
            return self.full(operand)
        batch_axes = [axis for axis, size in enumerate(dims[:-2]) if size == self.block.batch or size == 1]
        if not batch_axes:
            raise Refused("an attention mask without a batch axis has tokens for rows")
        return self._take(self.full(operand), len(dims) - 2, batch_axes[0], dims[-2])

    def _token_place(self, node: fx.Node) -> tuple[int, int, Any] | None:
        """(token axis, batch axis, length) of a value that can be indexed by the kept positions."""
        dims = self._dims(node)
        if dims is None or self.block.batch not in dims:
            return None
        axes = [axis for axis, size in enumerate(dims) if self._holds_tokens(size)]
        if len(axes) != 1:
            return None
        try:
            token_axis_of(self.block, axes[0], dims[axes[0]], node.name)
        except Refused:
            return None
        return axes[0], dims.index(self.block.batch), dims[axes[0]]

    def _take(self, value: fx.Node, token_axis: int, batch_axis: int, size: Any) -> fx.Node:
        return self.graph.call_function(
            primitives.take_tokens, (value, self._positions(token_axis, size), token_axis, batch_axis)
        )

    def _positions(self, axis: int, size: Any) -> fx.Node:
        """The kept positions along an axis of this length: within a joint sequence, beside the other tokens."""
        if size not in self._places:
            place = token_axis_of(self.block, axis, size, "a value of its graph")
            if not place.joint:
                self._places[size] = self.positions
            else:
                before, after = (self._length(sizes) for sizes in (place.before, place.after))
                stream = self.block.stream
                axes = self.block.leaves[stream].token_axes
                num_tokens = self.graph.call_method("size", (self.leaf_nodes[stream], axes[0].axis))
                args = (self.positions, before, num_tokens, after)
                self._places[size] = self.graph.call_function(primitives.place_indices, args)
        return self._places[size]

    def _length(self, sizes: tuple[tuple[int, int], ...]) -> Any:
        total: Any = 0
        for index, axis in sizes:
            size = self.graph.call_method("size", (self.leaf_nodes[index], axis))
            total = size if isinstance(total, int) else self.graph.call_function(operator.add, (total, size))
        return total

    def _copy(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> fx.Node:
        if node.op != "call_function":
            raise Refused(f"its graph holds a {node.op} node")
        if not isinstance(node.target, torch._ops.OpOverload) and node.target not in _PLAIN:
            raise Refused(f"its graph calls {node.target}")
        if node.target is _aten.sym_size.int:  # vmap has no rule for the operator
            return self.graph.call_method("size", fx.map_arg(node.args, value_of))
        return self._emit(node, fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of))

    def _emit(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)

    def _find_following(self) -> set[fx.Node]:
        """Nodes that depend on an input that follows the tokens."""
        found = set(self.moving)
        for node in self.source.nodes:
            if any(operand in found for operand in node.all_input_nodes):
                found.add(node)
        return found

    def _find_asked(self) -> tuple[list[Any], list[fx.Node]]:
        """Keys and values: those to be computed for all tokens, and those to be remembered."""
        computed: list[Any] = []
        remembered: dict[fx.Node, None] = {}
        for node in self.source.nodes:
            if node.target is _SDPA:
                operands = node.args[1:3]
            elif node.target in _QUERY_FIRST and node in self.following and self._mixes(node):
                operands = node.args[_QUERY_FIRST[node.target] + 1 :]
            else:
                continue
            following = [operand for operand in operands if operand in self.following]
            # A product over all tokens that has none itself (linear attention) has no rows to leave out.
            if self.block.config.context == "stale" and any(map(self._holds_tokens, self._dims(node))):
                remembered |= dict.fromkeys(following)
            else:
                computed += following
        return computed, list(remembered)

    def _holds_tokens(self, size: Any) -> bool:
        return self.block.token in size.free_symbols

    def _dims(self, node: Any) -> Any:
        """Shape of a tensor node; None for sizes and for several tensors."""
        return self.block.dims(node) if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) else None


_PLAIN: tuple[Any, ...] = (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg, torch.sym_max, torch.sym_min,
)  # fmt: skip
"""Functions on sizes and sequences that an exported graph may call."""

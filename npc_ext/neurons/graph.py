"""The graph of a model, and the walk from a layer downstream to the points where it can be measured."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .._torch import as_written, compiled_from, version_of
from .kinds import (
    CONVOLUTIONS,
    NORMALIZATION,
    class_before_fully_shard,
    is_linear,
    is_managed,
    is_weighted,
    torch_class,
)
from .relu import ReLU

_TRACED_INTO = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
# f(s x) = s f(x) for s > 0, within each channel.
_HOMOGENEOUS = {
    *("ReLU", "LeakyReLU", "PReLU", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous",),
}
_POOLING = {
    *(f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg", "LP") for d in (1, 2, 3)),
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for d in (1, 2, 3)),
}
_OTHER_ACTIVATIONS = {
    *("ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus", "Softsign", "Hardtanh", "ReLU6"),
    *("Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "Softshrink", "Hardshrink", "Threshold", "AlphaDropout"),
    *("elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "softsign", "hardtanh", "relu6"),
    *("hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold"),
    *("alpha_dropout", "sigmoid_", "tanh_", "elu_", "selu_", "celu_", "hardtanh_", "threshold_"),
}
_ASKS_FOR_SHAPE = {"size", "dim", "shape", "ndim", "dtype", "device", "getattr"}
_VIEWS = {
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "chunk", "split"),
    *("Flatten", "Unflatten", "Identity", "view_as", "expand", "movedim", "contiguous", "unbind", "narrow", "select"),
}


def is_measuring_relu(module: nn.Module) -> bool:
    """Whether a module is an `npc_ext.nn.ReLU`. A derived class does not count: it may compute something else."""
    return type(module) is ReLU


# ------------------------------------------------------------------------------------------ the graphs


_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "setitem")
}


class _Value(fx.Proxy):
    """A proxy that records `x += y` differently from `x + y`, and allows `x[i] = y`."""


for _operator in _IN_PLACE_OPERATORS:

    def _record(self: _Value, *arguments: Any, _operator: Any = _operator) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _operator, (self, *arguments), {})

    setattr(_Value, f"__{_operator.__name__}__", _record)


class _Tracer(fx.Tracer):
    """Traces into containers and users' modules, but not into layers and other modules of torch.nn.

    A module that cannot be traced becomes a single node of its caller's graph, and is added to `opaque`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[nn.Module] = []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = len(self.graph.nodes)
        if is_managed(m) and not self.is_leaf_module(m, ""):
            forward = m.forward  # without the hooks of fully_shard, which would gather the parameters
        if isinstance(inner := compiled_from(m), nn.Module):
            forward = inner
        try:
            return super().call_module(m, forward, args, kwargs)
        # The user's forward runs on proxies for tensors. Any exception means that it cannot be traced.
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            if m not in self.opaque:
                self.opaque.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule) or is_weighted(m) or is_measuring_relu(m):
            return True
        return class_before_fully_shard(m).__module__.startswith("torch.nn") and not isinstance(m, _TRACED_INTO)


class Place(NamedTuple):
    """A place where a layer can be measured.

    Attributes:
        module: the name of a module.
        where: "output" or "input" of the module.
        copy: whether what follows may work in place on the activation there.
        note: a remark for the reader of the table.
    """

    module: str
    where: str
    copy: bool
    note: str = ""


class NotMeasurableError(Exception):
    """A layer cannot be measured; the message is the reason."""


class Graphs:
    """The traced parts of a model: the calls of each module, and how their outputs are used.

    Attributes:
        modules: all modules of the model by name.
        calls: the nodes that call a module, by the module's name.
        targets: the name of the module that a node calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._name = {module: name for name, module in self.modules.items()}
        self.targets: dict[fx.Node, str] = {}
        self._opaque: set[str] = set()
        self._traced: set[nn.Module] = set()
        self._trace(model)
        # Branches that the forward pass did not take, for example the head of another task, are separate graphs.
        for name, module in self.modules.items():
            if name and not any(call == name or call.startswith(f"{name}.") for call in self.calls):
                self._trace(module)

    def _trace(self, module: nn.Module) -> None:
        if is_weighted(module) or module in self._traced:
            return
        self._traced.add(module)
        graph, opaque = _symbolic_trace(module)
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(str(node.target))
                self.targets[node] = self._name[called]  # a module may have several names; this is its first
                self.calls.setdefault(self._name[called], []).append(node)
        for part in opaque:
            self._opaque.add(self._name[part])
            for child in part.children():
                self._trace(child)

    def operation(self, node: fx.Node) -> str:
        """The operation of a node: the name of its function, its method, or its module's class in torch.nn."""
        if node.op == "call_module":
            return torch_class(self.modules[self.targets[node]])
        if node.op == "call_function":
            return getattr(node.target, "__name__", "").removeprefix("boolean_dispatch.")
        return str(node.target) if node.op == "call_method" else node.op

    def kind(self, node: fx.Node, convolution: bool) -> str | None:
        """The kind of an operation: "normalization", "homogeneous" or "activation"; None if it ends a walk."""
        name = _POOLING_FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""
        name = name or self.operation(node)
        if name in NORMALIZATION:
            return "normalization"
        if name in _HOMOGENEOUS:
            return "homogeneous"
        if name in _POOLING:
            indices = node.op == "call_module" and getattr(self.modules[self.targets[node]], "return_indices", False)
            return "homogeneous" if convolution and not indices and not node.kwargs.get("return_indices") else None
        return "activation" if name in _OTHER_ACTIVATIONS else None

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that use a value, except those that only read its shape."""
        return [user for user in node.users if self.operation(user) not in _ASKS_FOR_SHAPE]

    def works_in_place(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a consumer overwrites the value, directly or through a view of it."""
        name = self.operation(node)
        if node.op == "call_module" and (
            self.targets[node] in self._opaque or getattr(self.modules[self.targets[node]], "inplace", False)
        ):
            return True
        if node.kwargs.get("inplace") or (len(name) > 1 and name.endswith("_") and not name.endswith("__")):
            return True
        if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            return bool(node.args) and node.args[0] is value
        if name in _VIEWS:
            return any(self.works_in_place(user, node) for user in node.users) or "output" in {
                user.op for user in node.users
            }
        return False

    def is_overwritten(self, value: fx.Node) -> bool:
        """Whether a consumer of a value works in place, or is unknown."""
        users = self.consumers(value)
        return not users or any(user.op == "output" or self.works_in_place(user, value) for user in users)

    def leads_to(self, name: str, target: str) -> bool:
        """Whether the output of a module reaches another module. Also True if the path was not traced."""
        starts, ends = self.calls.get(name, []), self.calls.get(target, [])
        if not {node.graph for node in ends} <= {node.graph for node in starts}:
            return True
        reached, waiting = set(starts), list(starts)
        while waiting:
            users = waiting.pop().users.keys() - reached
            reached |= users
            waiting += users
        return not ends or not reached.isdisjoint(ends)

    def needs_copy(self, name: str) -> bool:
        """Whether the output of a module is, or may be, overwritten in any of its calls."""
        return any(map(self.is_overwritten, self.calls.get(name, []))) or name not in self.calls

    def measuring_points(self, name: str) -> tuple[list[Place], list[str]]:
        """Where to measure a layer.

        Returns:
            The places of all its calls, and the modules on the path whose per-channel parameters belong to the neurons.

        Raises:
            NotMeasurableError: there is no such place.
        """
        starts, at = self.calls.get(name, []), name
        if not starts and name.endswith("out_proj"):  # attention does not call it as a module
            owner = name.rpartition(".")[0]
            if isinstance(self.modules[owner], nn.MultiheadAttention):
                starts, at = self.calls.get(owner, []), owner
        if not starts:
            return [Place(at, "output", True)], []
        convolution = not is_linear(self.modules[name])
        walks = [_Walk(self, start, convolution) for start in starts]
        values = {node for walk in walks for node in walk.values}
        choices = [walk.choose(values) for walk in walks]
        scales = [
            self.targets[node]
            for node in walks[0].values[1:]
            if node.op == "call_module"
            and all(call in values for call in self.calls[self.targets[node]])
            # Behind a convolution, the scales of these norms belong to positions.
            and not (convolution and self.operation(node) in ("LayerNorm", "RMSNorm"))
        ]
        places: dict[tuple[str, str], Place] = {}
        for choice in choices:
            at_same_place = places.get(choice[:2], choice)
            places[choice[:2]] = choice._replace(copy=choice.copy or at_same_place.copy)
        measured = Counter(choice[:2] for choice in choices)
        if any(
            where == "output" and self._walks_through(module, walks) > measured[module, where]
            for module, where in places
        ):
            # A tap measures every call of its module, so a call that is also measured elsewhere would count twice.
            if any("normalization" in walk.kinds for walk in walks):
                raise NotMeasurableError(
                    "it is called several times, and not all calls can be measured at the same place behind their "
                    "normalization"
                )
            return [Place(at, "output", any(map(self.is_overwritten, starts)))], scales
        return list(places.values()), scales

    def _walks_through(self, module: str, walks: list[_Walk]) -> int:
        return sum(any(call in walk.values for call in self.calls[module]) for walk in walks)


class _Walk:
    """A call's result on its way downstream. An operation of kind `kinds[i]` turns `values[i]` into `values[i + 1]`."""

    def __init__(self, graphs: Graphs, start: fx.Node, convolution: bool) -> None:
        self.graphs = graphs
        self.values, self.kinds = [start], list[str]()
        if graphs.operation(start) == "MultiheadAttention":  # a tuple of the output and the attention weights
            outputs = [
                user for user in graphs.consumers(start) if user.target is operator.getitem and user.args[1] == 0
            ]
            if len(outputs) != 1:
                return
            self.kinds.append("homogeneous")
            self.values += outputs
        while len(users := graphs.consumers(self.values[-1])) == 1:
            kind = graphs.kind(users[0], convolution)
            if kind is None or users[0].args[:1] != (self.values[-1],):
                return
            self.kinds.append(kind)
            self.values.append(users[0])

    def choose(self, layer_values: set[fx.Node]) -> Place:
        """The last place that a hook can reach, or an equivalent one.

        Args:
            layer_values: all values of this layer. A module that is also called for another layer is not used.

        Raises:
            NotMeasurableError: there is none.
        """
        last = len(self.values) - 1
        equal = last  # every operation from here on is homogeneous, so importance is the same
        while equal > 0 and self.kinds[equal - 1] == "homogeneous":
            equal -= 1
        equivalent = range(last, equal - 1, -1)
        for at in equivalent:
            place = self._output(at, layer_values)
            if place and not place.copy and is_measuring_relu(self.graphs.modules[place.module]):
                return place
        # A convolution keeps its input for its backward pass, so measuring there uses no memory. The input of other
        # consumers comes second, because the head that consumes it may change from task to task.
        for consumer in (CONVOLUTIONS, nn.Module):
            for at in equivalent:
                if place := self._output(at, layer_values) or self._input(at, consumer):
                    return place
        for at in range(equal - 1, -1, -1):
            if self.kinds[at] == "normalization":
                raise NotMeasurableError(
                    "a normalization follows, and no module's output or input is behind it: make the normalization or "
                    "what follows it a module that is used once, or name a place with measure_at"
                )
            if place := self._output(at, layer_values) or self._input(at, nn.Module):
                name = self.graphs.operation(self.values[at + 1])
                return place._replace(note=f"measured before {name}, which is not a module that is used once")
        raise NotMeasurableError("no module's output or input shows its activation: name a place with measure_at")

    def _output(self, at: int, layer_values: set[fx.Node]) -> Place | None:
        node = self.values[at]
        if node.op != "call_module":
            return None
        name = self.graphs.targets[node]
        calls = self.graphs.calls[name]
        if not layer_values.issuperset(calls) or sum(call in self.values for call in calls) != 1:
            return None
        return Place(name, "output", self.graphs.is_overwritten(node))

    def _input(self, at: int, consumer: Any) -> Place | None:
        users = self.graphs.consumers(self.values[at])
        if len(users) != 1 or users[0].op != "call_module" or users[0].args[:1] != (self.values[at],):
            return None
        name = self.graphs.targets[users[0]]
        if not isinstance(self.graphs.modules[name], consumer) or len(self.graphs.calls[name]) > 1:
            return None
        return Place(name, "input", self.graphs.works_in_place(users[0], self.values[at]))


# torch.nn.functional wraps pooling in dispatchers that do not carry the function's name.
_POOLING_FUNCTIONS: dict[Any, str] = {
    function: name for name in _POOLING if (function := getattr(nn.functional, name, None)) is not None
}


def _symbolic_trace(module: nn.Module) -> tuple[fx.Graph, list[nn.Module]]:
    """The module's graph (empty if it cannot be traced) and its parts that cannot be traced. Changes no module."""
    defaults: dict[str, Any] = {}
    with contextlib.suppress(TypeError, ValueError):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
    for concrete in [defaults, None] if defaults else [None]:
        tracer = _Tracer()
        # As in `_Tracer.call_module`, any exception means that it cannot be traced.
        with contextlib.suppress(Exception), _unchanged(module), _no_fast_path(), as_written():
            return tracer.trace(module, concrete_args=concrete), tracer.opaque
    return fx.Graph(), [module]


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Restores the attributes and buffers of modules, and the random state, after a forward pass on proxies."""
    saved = [(m, dict(m.__dict__)) for m in module.modules()]
    containers = [
        (c, c.copy()) for _, attributes in saved for c in attributes.values() if isinstance(c, (dict, list, set))
    ]
    buffers = [(b, version_of(b), b.detach().clone()) for b in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for m, attributes in saved:
                m.__dict__.clear()
                m.__dict__.update(attributes)
            for container, entries in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(entries)
            for buffer, version, value in buffers:
                if version_of(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Disables the inference path of transformer layers, which they choose by shapes. Proxies have no shapes."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)

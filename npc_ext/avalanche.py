"""NPC in Avalanche's strategies, which change models and optimizers between experiences.

>>> strategy = Naive(model=model, optimizer=NPC(model, lr=0.1), plugins=[PlasticityPlugin()])

Before each experience, a strategy may grow the model (heads of new tasks, outputs of new classes). It adds the new
parameters to the optimizer's groups, and discards the optimizer's state: always that of grown parameters, and the first
time that of all parameters. So NPC would lose importance, and would not measure new neurons. Needs `avalanche-lib`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

try:
    from avalanche.training.plugins import SupervisedPlugin
except ImportError as error:
    raise ImportError(
        f"npc_ext.avalanche needs avalanche-lib, which cannot be imported ({error}): pip install avalanche-lib "
        "(it needs a torchvision that matches torch)"
    ) from error
from torch import Tensor, nn

from ._warn import warn
from .distributed.sinks import unwrapped
from .neurons.tap import ImportanceWarning
from .optim.plastic import Plastic
from .optim.succession import continues, first_block
from .optim.wrapper import PlasticityWrapper


class PlasticityPlugin(SupervisedPlugin):
    """Keeps importance and momentum from one experience to the next, and measures new neurons.

    While a strategy adapts its optimizer, it gets a stand-in. The groups of the stand-in then show which parameters
    were added, removed and grown. In a parameter that has grown (`IncrementalClassifier`), the old neurons keep their
    importance and momentum, and the new ones start at zero. The optimizer remains the same object.

    Use it with `NPC`, `NPCAdamW`, or a `PlasticityWrapper` around any other optimizer, built on the model that the
    strategy trains. As always in Avalanche, all parameters of the model are trained. If the model grows during an
    experience, because unseen classes were evaluated, the optimizer is adapted before the next step.

    Raises:
        TypeError: the strategy's optimizer does not measure neurons. This and the following are raised when training
            begins.
        ValueError: the optimizer was built on another model than the strategy's.
        RuntimeError: the strategy replaced the optimizer.

    Warns:
        ImportanceWarning: a parameter was replaced by one that does not begin with its values, so its importance and
            momentum start at zero.

    Example:
        >>> strategy = Naive(model=model, optimizer=NPC(model, lr=0.1), plugins=[PlasticityPlugin()])
        >>> for experience in benchmark.train_stream:
        ...     strategy.train(experience)
    """

    def __init__(self) -> None:
        super().__init__()
        self._optimizer: Plastic | PlasticityWrapper | None = None
        self._stand_in: _StandIn | None = None
        self._known: dict[str, nn.Parameter] = {}  # the model's parameters when the optimizer was adapted

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Called by the strategy before model and optimizer are adapted."""
        self._hand_over_stand_in(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Called by the strategy after model and optimizer were adapted."""
        self._adapt(strategy)

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Called by the strategy before each step."""
        if strategy.optimizer is not self._optimizer:
            raise RuntimeError(_REPLACED.format(type(strategy.optimizer).__name__))
        if list(map(id, strategy.model.parameters())) != list(map(id, self._known.values())):
            self._hand_over_stand_in(strategy)
            strategy.make_optimizer()
            self._adapt(strategy)

    def _hand_over_stand_in(self, strategy: Any) -> None:
        optimizer = strategy.optimizer
        if optimizer is self._stand_in and optimizer is not None:  # left over from an exception
            optimizer = self._optimizer
        if not isinstance(optimizer, (Plastic, PlasticityWrapper)):
            raise TypeError(
                f"the strategy's optimizer is {type(optimizer).__name__}, which measures no neurons; expected "
                "NPC(model, ...), NPCAdamW(model, ...), or PlasticityWrapper(optimizer, model) around another one"
            )
        if _plastic(optimizer)._model is not unwrapped(strategy.model):
            raise ValueError(
                f"the strategy's {type(optimizer).__name__} was built on another model than the strategy trains; build "
                "both with the same model"
            )
        if optimizer is not self._optimizer:  # in the first experience, or if the optimizer was replaced since
            self._known = dict(strategy.model.named_parameters())
        self._optimizer, self._stand_in = optimizer, _StandIn(optimizer)
        strategy.optimizer = self._stand_in

    def _adapt(self, strategy: Any) -> None:
        """Restores the optimizer, with the groups that the strategy gave the stand-in."""
        optimizer, stand_in = self._optimizer, self._stand_in
        if optimizer is None or stand_in is None or strategy.optimizer is not stand_in:
            raise RuntimeError(_REPLACED.format(type(strategy.optimizer).__name__))
        strategy.optimizer, self._stand_in = optimizer, None
        known, self._known = self._known, dict(strategy.model.named_parameters())
        plastic = _plastic(optimizer)
        importance = self._move_state(known, optimizer, plastic)
        for group, adapted in zip(optimizer.param_groups, stand_in.param_groups, strict=False):
            group["params"] = adapted["params"]
        added = stand_in.param_groups[len(optimizer.param_groups) :]
        if plastic is not optimizer:  # the tracker of a wrapper: its groups have the same options
            plastic.param_groups[0]["params"] = [p for group in optimizer.param_groups for p in group["params"]]
            del plastic.param_groups[1:]
        plastic._learn_model()
        plastic._find_layers()
        for group in added:
            optimizer.add_param_group(group)
        for parameter, old_neurons in importance.items():
            if "importance" in plastic.state[parameter]:
                plastic.state[parameter]["importance"][: len(old_neurons)] = old_neurons

    def _move_state(
        self, known: Mapping[str, nn.Parameter], optimizer: Plastic | PlasticityWrapper, plastic: Plastic
    ) -> dict[nn.Parameter, Tensor]:
        """Moves the state of parameters that were replaced; returns the importance of their old neurons."""
        importance, reset = {}, []
        for name, old in known.items():
            new = self._known.get(name)
            if new is None or new is old:
                continue
            state = optimizer.state.pop(old, {})
            measured = (state if plastic is optimizer else plastic.state.pop(old, {})).pop("importance", None)
            if not continues(new, old):
                reset.append(name)
                continue
            if measured is not None:
                importance[new] = measured
            if state:
                optimizer.state[new] = {key: _grown(value, old, new) for key, value in state.items()}
        if reset:
            warn(
                f"{', '.join(map(repr, reset))}: replaced by parameters that do not begin with their values, so "
                "importance and momentum start at zero",
                ImportanceWarning,
            )
        return importance


class _StandIn(torch.optim.Optimizer):
    """Holds a copy of an optimizer's groups for a strategy to change, and takes no steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(
            "the strategy takes a step, but its optimizer was not adapted to the experience; PlasticityPlugin's "
            "before_training_exp has to be called before training begins (does the strategy override "
            "_before_training_exp?)"
        )


_REPLACED = (
    "the strategy's optimizer was replaced by another {} after the experience began, so importance would be lost; let "
    "make_optimizer change the groups of strategy.optimizer, or remove PlasticityPlugin"
)


def _plastic(optimizer: Plastic | PlasticityWrapper) -> Plastic:
    """The optimizer that measures: the tracker of a wrapper."""
    return optimizer._tracker if isinstance(optimizer, PlasticityWrapper) else optimizer


def _grown(value: Any, old: Tensor, new: Tensor) -> Any:
    """A state tensor of the old parameter's shape, extended by zeros to the new shape; other values unchanged."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    grown = torch.zeros_like(new, dtype=value.dtype, requires_grad=False)
    first_block(grown, old.shape).copy_(value)
    return grown

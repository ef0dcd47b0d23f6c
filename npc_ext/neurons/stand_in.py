"""What is placed in a model: objects that replace a module's forward, hooks, and handles to remove them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

from torch import nn

from .._torch import TRACES_BOUND_FORWARDS


@dataclass(frozen=True)
class Handle:
    """The handle of something that was placed in a model. `remove()` removes it."""

    remove: Callable[[], None]


def _refuse_script(*_: Any) -> Any:
    raise AttributeError(
        "torch.jit.script cannot compile what an optimizer of npc_ext has placed in the model: take it out first "
        "with optimizer.neurons.detach(); to continue training (and for SSL, which has no detach) script another "
        "model that has loaded model.state_dict()"
    )


class Unscriptable:
    """A hook that torch.jit.script cannot compile.

    torch.jit.script reads the `__name__` of hooks, and shows the error. For other code, the AttributeError means that
    the attribute does not exist.
    """

    __name__ = property(_refuse_script)


class StandIn:
    """Replaces a module's `forward` by its `__call__`, as an attribute of the module. Can be pickled with the module.

    Its users are taps or layers of all optimizers of the model. It stays in the module as long as it has any.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._usual: Callable[..., Any] = type(module).forward
        self._users: list[Any] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Takes the same arguments as the module's forward."""
        raise NotImplementedError

    @property
    def __code__(self) -> CodeType:  # torch.export reads the names of arguments
        return self._usual.__code__

    @staticmethod
    def of(module: nn.Module) -> Any:
        """The object that replaces a module's `forward`, or whose method does; None without such an attribute."""
        forward = module.__dict__.get("forward")
        return forward if isinstance(forward, StandIn) else getattr(forward, "__self__", None)

    def join(self, user: Any) -> Handle:
        """Adds a user, and places the stand-in in the module. The handle's `remove()` undoes that."""
        self._users.append(user)
        self._module.forward = self.__call__ if TRACES_BOUND_FORWARDS else self
        self._module.__prepare_scriptable__ = _refuse_script  # torch.jit.script calls it first
        return Handle(partial(self.leave, user))

    def users(self) -> list[Any]:
        """All users that have joined."""
        return list(self._users)

    def leave(self, user: Any) -> None:
        """Removes a user. With the last one, removes the stand-in from the module, if it is still there."""
        if user in self._users:  # a copy does not have the users
            self._users.remove(user)
        if not self._users and StandIn.of(self._module) is self:
            del self._module.forward, self._module.__prepare_scriptable__

"""NPC with AdamW's update, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..columns import AdamNetwork, AdamOptions, columns_of
from ..distributed.shards import local
from ..kernels import launch
from .options import CONSTANTS, check_choice, check_number, check_plasticity_options
from .plan import PlasticPlan
from .plastic import Plastic
from .unknown_options import explains_options


class NPCAdamW(Plastic):
    """AdamW with steps that shrink for each neuron with the neuron's importance to earlier tasks.

    `beta` and `betas` are two things, named as in the papers: `beta` is the importance at or above which a neuron is
    frozen, and `betas` are the decay rates of AdamW's moments.

    Importance is measured and averaged as in `NPC` (eqs. 2 to 4). AdamW's step of neuron i, including weight decay, is
    multiplied by

        s_i = min(1, alpha * sqrt(max(beta / C_i - 1, 0)))    (eq. 7)

    Where `s_i` is 0, the neuron is frozen: its weights and their moments stay bit-identical. Its first moment is
    cleared when it freezes, so that no old gradient moves it when it thaws. The whole step is one call of a compiled
    kernel.

    Sources: Paik et al., "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity Control", AAAI 2020, arXiv
    1907.13322; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.

    Use it like `torch.optim.AdamW`, with the model in place of its parameters. `PlasticityWrapper` does the same for
    any optimizer, but copies weights, and moments of frozen neurons follow their gradients.

    Args:
        model, params, layers, other_parameters, skip_gradients, process_group, backend: as in `NPC`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. Moments of half-precision weights are float32.
        alpha, beta, delta, half_life, sigma, normalize: as in `NPC`.
        maximize, stochastic_rounding: as in `NPC`.

    Raises:
        ValueError: an argument is out of range or does not fit the model; the message says what to change.
        TypeError: an argument has the wrong type, or there is no such option.

    Warns:
        ImportanceWarning: more than half of the elements that are trained belong to no neuron.

    Example:
        >>> optimizer = NPCAdamW(model, lr=1e-3)  # was: torch.optim.AdamW(model.parameters(), lr=1e-3)
    """

    _OPTIONS = (*CONSTANTS, "betas", "eps", "weight_decay", "maximize", "stochastic_rounding")
    _SCHEDULED = ("betas", "weight_decay")
    _STATE_TENSORS = ("exp_avg", "exp_avg_sq")

    @explains_options
    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        alpha: float = 0.5,
        beta: float = 0.5,
        delta: float | None = None,
        half_life: float | None = None,
        sigma: Literal["sigmoid", "tanh", "erf"] = "sigmoid",
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        normalize: Literal["all", "active"] = "all",
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        other_parameters: Literal["train", "freeze"] = "train",
        skip_gradients: Literal["layers", "rows", "none"] = "layers",
        process_group: Any = "auto",
        backend: Literal["auto", "native", "reference"] = "auto",
    ) -> None:
        super().__init__(locals())

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, options[name], where)
        check_choice(f"{where}maximize", options["maximize"], (True, False))
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_is_decay, betas)):
            raise ValueError(
                f"{where}betas is {betas!r}; expected two numbers in [0, 1), as in (0.9, 0.999). The importance at or "
                "above which a neuron is frozen is called beta"
            )
        check_plasticity_options(options, where)

    def _counts_steps(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        return True

    def _create_state(self, parameter: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for name in self._STATE_TENSORS:
            if state.get(name) is None:
                state[name] = self._new_state_tensor(parameter, name)
        super()._create_state(parameter, group)

    def _first_moment(self, state: Mapping[str, Any], has_momentum: bool) -> Tensor | None:
        return local(state["exp_avg"])

    def _scheduled(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        lr, betas = group["lr"], group["betas"]
        betas = betas if isinstance(betas, (tuple, list)) else [None]  # which is found to be an error
        return None if self._read_on_device(lr) else float(lr), *betas, group["weight_decay"]

    def _step_options(self, device: torch.device, groups: Sequence[Mapping[str, Any]]) -> AdamOptions:
        first, second = ([float(group["betas"][which]) for group in groups] for which in (0, 1))
        epsilon, rates = [group["eps"] for group in groups], self._rates(device, groups)
        return columns_of(AdamOptions, groups, lr=rates, first_decay=first, second_decay=second, epsilon=epsilon)

    def _launch(self, plan: PlasticPlan) -> None:
        moments = plan.state_tensors("exp_avg"), plan.state_tensors("exp_avg_sq")
        network = AdamNetwork(plan.parameters, plan.gradients(), *moments)
        plan.launch(launch.adam_update_, self._operations, network, self._measured(plan))


def _is_decay(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1

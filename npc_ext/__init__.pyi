"""The public names: each is written here once. `__init__.py` reads this file and loads them at their first use."""

from . import baselines as baselines
from . import nn as nn
from . import ops as ops
from . import reference as reference
from .baselines.cpc import CPC as CPC
from .baselines.cpc import ConnectionPlasticity as ConnectionPlasticity
from .baselines.ewc import EWC as EWC
from .baselines.mas import MAS as MAS
from .baselines.si import SI as SI
from .baselines.ssl import SSL as SSL
from .monitor import CapacityWarning as CapacityWarning
from .monitor import check_capacity as check_capacity
from .monitor import log_plasticity as log_plasticity
from .monitor import plot_plasticity as plot_plasticity
from .neurons.find import find_neurons as find_neurons
from .neurons.tap import ImportanceWarning as ImportanceWarning
from .optim.npc import NPC as NPC
from .optim.npc_adamw import NPCAdamW as NPCAdamW
from .optim.plasticity import LayerPlasticity as LayerPlasticity
from .optim.wrapper import PlasticityWrapper as PlasticityWrapper

__version__: str

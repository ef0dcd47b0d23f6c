"""The methods that NPC is compared with, as optimizers of the same form."""

from . import consolidation as consolidation

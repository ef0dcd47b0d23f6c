"""Setups of the pages about examples."""

from __future__ import annotations

from ..names import Setup

SETUPS: dict[str, Setup] = {}

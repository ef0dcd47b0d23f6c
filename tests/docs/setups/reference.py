"""Setups of the reference."""

from __future__ import annotations

from ..names import Setup

SETUPS: dict[str, Setup] = {}

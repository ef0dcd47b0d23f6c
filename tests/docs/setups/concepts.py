"""Setups of the concepts."""

from __future__ import annotations

from ..names import Setup

SETUPS: dict[str, Setup] = {}

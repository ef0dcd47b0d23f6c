"""Setups of the pages about development."""

from __future__ import annotations

from ..names import Setup

SETUPS: dict[str, Setup] = {}

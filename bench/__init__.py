"""Benchmarks and experiments; README.md says what each command does."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

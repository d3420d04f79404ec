"""The base rules: what a gradient step does. A file each; here they are registered."""

from __future__ import annotations

from triton_hybrid.rules.adamw import ADAMW
from triton_hybrid.rules.lion import LION
from triton_hybrid.rules.muon import MUON
from triton_hybrid.rules.rule import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, LION, MUON)}
"""Every base rule by its value of ``base``."""

OPTIONS = {name: value for rule in RULES.values() for name, value in rule.defaults.items()}
"""Options of all rules, with their defaults."""

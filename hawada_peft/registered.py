"""Importing this registers the tuner with PEFT."""

from __future__ import annotations

from ._register import register
from .config import HawAdaConfig
from .discovery import families as families  # whoever looks for rows asks it
from .model import HawAdaModel

register(HawAdaConfig, HawAdaModel)

"""Importing this registers the tuner with PEFT."""

from __future__ import annotations

from ._register import register
from .config import HawAdaConfig
from .model import HawAdaModel

register(HawAdaConfig, HawAdaModel)

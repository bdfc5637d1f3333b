"""Editors: one file each, and the union that the study schema is made of."""

from typing import Annotated

from pydantic import Field

from retention.editors.identity import Identity
from retention.editors.lora import Lora
from retention.editors.memit import Memit
from retention.editors.rome import Rome

AnyEditor = Annotated[Identity | Rome | Memit | Lora, Field(discriminator="name")]

__all__ = ["AnyEditor", "Identity", "Lora", "Memit", "Rome"]

"""Editors: one file each, and the union that the study schema is made of."""

from typing import Annotated

from pydantic import Field

from retention.editors.alphaedit import AlphaEdit
from retention.editors.emmet import Emmet
from retention.editors.freeze_tuning import FreezeTuning
from retention.editors.ft import Ft
from retention.editors.identity import Identity
from retention.editors.locft import LocFt
from retention.editors.lora import Lora
from retention.editors.memit import Memit
from retention.editors.ptuning import PTuning
from retention.editors.random import Random
from retention.editors.rome import Rome

AnyEditor = Annotated[
    Identity | Rome | Memit | Emmet | AlphaEdit | Ft | LocFt | FreezeTuning | Lora | PTuning | Random,
    Field(discriminator="name"),
]

__all__ = ["AnyEditor"]

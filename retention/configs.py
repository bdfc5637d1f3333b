"""The configuration of a model that may not have been made or fetched yet. Loads no weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from retention.estimate import configuration, published
from retention.model_folder import fetching
from retention.models import HubModel, resolve
from retention.types import Missing, UserError
from retention.world.train import architecture


def config_of(model: Any) -> Any:
    """The architecture of a study's model, as a transformers configuration.

    A plan fetches nothing: there a well-known model's stands in for what is not here. Raises Missing for others.
    """
    try:
        return _own_config(model)
    except Missing:
        shape = published(model.name)
        if shape is None or fetching():
            raise
        return configuration(shape)


@lru_cache(maxsize=16)
def _own_config(model: Any) -> Any:
    if not isinstance(model, HubModel):
        return architecture(model, vocabulary=1000)
    from transformers import AutoConfig

    folder = resolve(model.name, model.revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        int(config.get_text_config().num_hidden_layers)
    except Exception as error:  # a stranger's file: configurations fail in many ways
        raise UserError(f"model: {folder}: its config.json describes no causal language model: {error}") from None
    return config

"""Plug-in for axolotl: `adapter: mola` in its YAML trains a mixture, see docs/guides/axolotl.md.

axolotl finds the plug-in by the entry point in pyproject.toml and imports the plug-in whenever axolotl starts.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field
from transformers import set_seed

from mola.errors import MolaError
from mola.integrations import axolotl_fields as yaml
from mola.integrations.mixture_settings import check_version, continued_config, require_router_losses

TRIED = "0.21.0"


class MolaArgs(BaseModel):
    """The additional field of axolotl's YAML; `MolaPlugin.register` checks its value."""

    mola: dict[str, Any] | None = Field(None, description=f"Settings of a mixture: {', '.join(yaml.FIELDS)}")


class MolaPlugin(BasePlugin):
    """Adds the adapter type `mola`."""

    _given: dict[str, Any] | None = None

    def register(self, cfg: dict) -> None:
        """Check the YAML as the user wrote it, before anything is loaded.

        Raises:
            MolaError: a field that a mixture cannot use, a wrong value, or an attempt to merge a mixture.
        """
        yaml.check_merge(cfg)
        if cfg.get("adapter") == "mola":
            check_version("axolotl", version("axolotl"), TRIED)
            yaml.check_inference(cfg)
            self._given = yaml.given_settings(cfg)
        elif cfg.get("mola"):
            raise MolaError(f"The block `mola` needs `adapter: mola`, got {cfg.get('adapter')!r}.")

    def get_input_args(self) -> str:
        """Name of the class with the additional fields of the YAML."""
        return f"{__name__}.MolaArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name. The adapter is not marked as a kind of LoRA, or axolotl would build a `LoraConfig`."""
        return [AdapterCapabilities(name="mola")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Add a new mixture to the model, or load the one in `lora_model_dir`.

        Raises:
            MolaError: the mixture does not fit the model or the YAML.
        """
        if cfg.adapter != "mola":
            return None
        given = yaml.given_settings(cfg) if self._given is None else self._given
        folder, dtype = cfg.lora_model_dir, cfg.peft_autocast_adapter_dtype
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        config = continued_config(model, folder, given) if folder else yaml.new_config(given)
        if config_only:
            return None, config
        if folder:
            adapted: Any = PeftModel.from_pretrained(
                model, folder, is_trainable=not inference, config=config, **options
            )
        else:
            if cfg.seed is not None:
                set_seed(cfg.seed)
            adapted = get_peft_model(model, config, **options)
        adapted.print_trainable_parameters()
        return (adapted if inference else require_router_losses(adapted)), config

"""Flags of low-rank adapters (LoRA), and what they cannot be combined with."""

from dataclasses import dataclass
from typing import Any

from networks.lora import TARGETS, LoraConfig
from runtime.errors import UserError
from runtime.flags import Derived, setting


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Adapters."""

    lora_rank: int = setting(
        0,
        "train adapters of this rank beside the blocks' maps, and not the weights of the "
        "--init_from model (LoRA): 4 to 64; 0 trains all weights",
        at_least=0,
    )
    lora_alpha: float = setting(
        Derived("lora_rank"),
        "the adapters' output is scaled by lora_alpha / lora_rank",
        above=0,
        only_with=("lora_rank", None),
    )
    lora_targets: tuple[str, ...] = setting(
        TARGETS, "maps with an adapter: attention, mlp, or both", only_with=("lora_rank", None)
    )


def check_lora(config: Any) -> None:
    """Reject what adapters cannot be trained with.

    Args:
        config: a resolved `TrainConfig`.

    Raises:
        UserError: there is no model to adapt, or a flag is about weights that are frozen.
    """
    if not config.lora_rank:
        return
    given = f"--lora_rank {config.lora_rank}"
    if not (config.init_from or config.profile):
        raise UserError(f"{given} adapts another model: name it by --init_from RUN_OR_MODEL")
    if config.optimizer != "adamw":
        raise UserError(
            f"--optimizer {config.optimizer}: it updates the blocks' matrices, which {given} "
            "freezes; leave it out"
        )
    if config.mup:
        raise UserError(f"--mup {config.mup} is for weights that start fresh: drop it or {given}")


def lora_config(config: Any) -> LoraConfig | None:
    """Return the adapters of a resolved `TrainConfig`, or None without."""
    if not config.lora_rank:
        return None
    return LoraConfig(config.lora_rank, config.lora_alpha, tuple(config.lora_targets))

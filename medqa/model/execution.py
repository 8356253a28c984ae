"""How a recipe's update is computed. Not what: with another execution it is the same update but for the last digits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Change = tuple[str, str, str]  # asked, in effect, why


@dataclass(frozen=True)
class Execution:
    """What is decided before the model is loaded.

    Attributes:
        padding_free: training lays examples end to end (`data.batches.pack`); else it pads as the recipe says.
        evaluation_padding_free: evaluation does, whatever training does.
        attn_implementation: by the name that transformers knows it under.
        dequantize: 4-bit weights are expanded once, and kept so.
        planned_tokens: the most tokens of a micro-batch without padding for which the plan has room; None: not asked.
        shards: in how many pieces, on as many processes, the frozen weights are held; 1: whole.
        return_memory: freed memory goes back to the system at once (`training.memory`), which is slower.
        reasons: `section.key` to (asked, in effect, why) where the two differ.
    """

    padding_free: bool
    evaluation_padding_free: bool
    attn_implementation: str
    gradient_checkpointing: bool
    dequantize: bool
    planned_tokens: int | None = None
    shards: int = 1
    return_memory: bool = False
    reasons: Mapping[str, Change] = field(default_factory=dict)

    def fast_lora(self, device_type: str) -> bool:
        """Whether LoRA is computed as `fast_lora.py` does."""
        return self.padding_free and device_type == "cpu"

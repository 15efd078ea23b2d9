"""Reproduce the quantized values of single weights, which the adapter was trained against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel

_CHUNK = 2**18
"""Number of values that are quantized at a time."""
_BLOCK = 64
"""Values that share a scale: the default of bitsandbytes, which loading uses."""


class FakeQuantizer:
    """Quantizes and dequantizes single weights as loading the whole model would."""

    def __init__(self, skeleton: PreTrainedModel, options: dict[str, Any]) -> None:
        """
        Args:
            skeleton: the model on the meta device. It is changed.
            options: what the base was loaded with: `load_options()` of its quantization.
        """
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.auto import AutoHfQuantizer

        self._config: BitsAndBytesConfig | None = options.get("quantization_config")
        self._dtype: torch.dtype = options["dtype"]
        self._is_transposed: dict[str, bool] = {}
        if self._config is None:
            return
        quantizer = AutoHfQuantizer.from_config(self._config, pre_quantized=False)
        quantizer.preprocess_model(model=skeleton, device_map={"": "cpu"})
        for name, module in skeleton.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                self._is_transposed[f"{name}.weight"] = module.source_cls is Conv1D

    @property
    def names(self) -> set[str]:
        """The weights that were quantized."""
        return set(self._is_transposed)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight as the adapter saw it, in the dtype that it was dequantized to."""
        assert self._config is not None
        held = weight.T if self._is_transposed[name] else weight
        held = held.to(self._dtype).contiguous()
        restored = _eight_bit(held) if self._config.load_in_8bit else self._four_bit(held)
        return restored.T.contiguous() if self._is_transposed[name] else restored

    def _four_bit(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize in pieces: it takes many times the memory of its input."""
        import torch
        from bitsandbytes import functional

        assert self._config is not None
        width = weight.shape[1]
        # If a row ends inside a block, the result on a CPU depends on the shape: use one piece.
        rows = max(1, _CHUNK // width) if width % _BLOCK == 0 else len(weight)
        parts = [
            functional.quantize_4bit(piece, quant_type=self._config.bnb_4bit_quant_type)
            for piece in weight.split(rows)
        ]
        scales = torch.cat([state.absmax for _, state in parts])
        if self._config.bnb_4bit_use_double_quant:
            offset = scales.mean()
            codes, statistics = functional.quantize_blockwise(scales - offset, blocksize=256)
            scales = functional.dequantize_blockwise(codes, statistics) + offset
        restored = torch.empty_like(weight)
        sizes = [len(state.absmax) for _, state in parts]
        pieces = zip(restored.split(rows), parts, scales.split(sizes), strict=True)
        for piece, (packed, state), absmax in pieces:
            state.absmax = absmax
            piece.copy_(functional.dequantize_4bit(packed, state))
        return restored


def _eight_bit(weight: Tensor) -> Tensor:
    import torch
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    restored: Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return restored

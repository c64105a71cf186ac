"""The `codequant` quantization method of transformers: `from_pretrained` and `save_pretrained` of a quantized folder.

transformers imports this module while it is itself being imported (see `registration`), so what needs models is
imported inside the hooks.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from codequant.errors import InputError
from codequant.quantization_config import QUANT_METHOD, QuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class CodequantConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json as transformers wants it: a thin case around QuantizationConfig."""

    quant_method: Any = QUANT_METHOD  # transformers' own methods are an enum

    def __init__(self, **values: Any) -> None:
        self.config = QuantizationConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()


@register_quantizer(QUANT_METHOD)
class CodequantQuantizer(HfQuantizer):
    """Builds the quantized modules before the weights are read, and names every tensor."""

    quantization_config: CodequantConfig
    requires_calibration = True  # a source model is quantized by codequant.quantize, never by from_pretrained
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise InputError(f"device_map: offloads to {sorted(devices)}, expected every module on a computing device")

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        from codequant.runtime.read_ahead import read_ahead
        from codequant.runtime.replacement import replace_modules
        from codequant.verification import check_model_files

        config = self.quantization_config.config
        if type(model).__name__ not in (model.config.architectures or ()):
            raise InputError(
                f"{type(model).__name__}: expected {model.config.architectures}, loaded by AutoModelForCausalLM"
            )
        if checkpoint_files is not None:
            files = [Path(file) for file in checkpoint_files]
            check_model_files(model, config, files)
            read_ahead(files)
        self.transforms = replace_modules(model, config)
        kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(model.dtype)]
        self.dtypes = {
            name: torch.float32 if any(pattern.search(name) for pattern in kept) else tensor.dtype
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and not name.endswith("_step")
        }

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        large = {id(module.weight) for module in embeddings if module is not None}
        for name, dtype in self.dtypes.items():
            tensor = model.get_parameter_or_buffer(name)
            # transformers 5.17 leaves every renamed tensor of a quantized checkpoint in the type of the file. And one
            # norm that stays a view of the mapped file would keep all of it in memory, beside the repacked weights.
            tensor.data = tensor.data.to(dtype, copy=tensor.device.type == "cpu" and id(tensor) not in large)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Every name comes from our table; transformers' converters merge the experts that stay plain."""
        from transformers.core_model_loading import WeightConverter

        return [*self.transforms, *(t for t in weight_conversions if isinstance(t, WeightConverter))]

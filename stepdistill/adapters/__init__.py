"""One small file for each family of networks: how it is called, and nothing else."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from stepdistill.adapters.base import Adapter

__all__ = ["ADAPTERS", "Adapter", "adapter_for"]

ADAPTERS = {
    "UNet2DModel": "unet:UNetAdapter",
    "UNet2DConditionModel": "unet:TextUNetAdapter",
    "DiTTransformer2DModel": "dit:DiTAdapter",
    "PixArtTransformer2DModel": "pixart:PixArtAdapter",
    "SD3Transformer2DModel": "mmdit:SD3Adapter",
    "AuraFlowTransformer2DModel": "mmdit:AuraFlowAdapter",
    "FluxTransformer2DModel": "packed:FluxAdapter",
    "Flux2Transformer2DModel": "packed:Flux2Adapter",
    "QwenImageTransformer2DModel": "packed:QwenImageAdapter",
    "SanaTransformer2DModel": "sana:SanaAdapter",
    "VectorMLP": "mlp:MLPAdapter",
    "Lumina2Transformer2DModel": "reversed:Lumina2Adapter",
    "ZImageTransformer2DModel": "reversed:ZImageAdapter",
    "HiDreamImageTransformer2DModel": "reversed:HiDreamAdapter",
    "WanTransformer3DModel": "video:WanAdapter",
    "LTXVideoTransformer3DModel": "video:LTXAdapter",
    "HunyuanVideoTransformer3DModel": "video:HunyuanVideoAdapter",
    "CogVideoXTransformer3DModel": "cogvideox:CogVideoXAdapter",
}
"""Network class name -> "file:class" of its adapter in this folder."""


def adapter_for(net: nn.Module) -> Adapter:
    """The adapter of a network, found by its class's name.

    Raises:
        ValueError: a class that has none.
    """
    name = type(net).__name__
    if name not in ADAPTERS:
        raise ValueError(
            f"no adapter for {name}; known are {', '.join(ADAPTERS)}. Subclass "
            "stepdistill.adapters.Adapter (two short methods) and pass it to Denoiser(adapter=...)"
        )
    file, cls = ADAPTERS[name].split(":")
    adapter: Adapter = getattr(import_module(f"stepdistill.adapters.{file}"), cls)()
    return adapter

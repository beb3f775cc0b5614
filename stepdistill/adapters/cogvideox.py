"""CogVideoX: v-prediction on videos whose frames come first, with rotary embeddings or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import ATTENTION, FEED, TextAdapter, given, unwrapped

SLOWEST = 10000.0  # the longest wave of rotary embeddings, over the shortest
OFFSET = 2.0  # what image-to-video networks of 1.5 are told


class CogVideoXAdapter(TextAdapter):
    """``net(hidden_states, text, timestep, rotary)``: states [B, T, C, H, W].

    There is no mask: what fills up is read as well. Networks without rotary embeddings want
    ``max_text_seq_length`` tokens. Image-to-video networks are fed ``cond.image`` beside the state.
    """

    embedder = "time_embedding"
    lora_targets = (*ATTENTION, *FEED)
    innate = ("*.to_out.*", "*.ff.net.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        net = unwrapped(call)
        config = net.config
        out: Tensor = call(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=given(net, cond, "text"),
            timestep=time,
            ofs=time.new_full((1,), OFFSET) if config.ofs_embed_dim else None,
            image_rotary_emb=_rotary(config, x),
            return_dict=False,
        )[0]
        return out.transpose(1, 2)

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, T, H, W) from the network's config, whose frames are those of the video."""
        config: Any = net.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        frames += -frames % (config.patch_size_t or 1)
        channels = config.in_channels - self.beside(net)
        return (channels, frames, config.sample_height, config.sample_width)


def _rotary(config: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [T' H' W', D] of the places of a video's patches, if the network has them.

    A quarter of the D coordinates of a head tells the frame, three eighths each row and column.
    """
    if not config.use_rotary_positional_embeddings:
        return None
    dim, places = config.attention_head_dim, _places(config, x)
    widths = (dim // 4, dim // 8 * 3, dim // 8 * 3)
    frames, rows, columns = (_angles(*pair) for pair in zip(places, widths, strict=True))
    grid = [len(place) for place in places]
    spread = (
        frames[:, None, None].expand(*grid, -1),
        rows[None, :, None].expand(*grid, -1),
        columns[None, None, :].expand(*grid, -1),
    )
    angles = torch.cat(spread, dim=3).flatten(0, 2)
    return angles.cos(), angles.sin()


def _places(config: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [T'], rows [H'] and columns [W'] of patches.

    Networks whose patches hold several frames count; of the others rows and columns are those of
    the training size that the video, enlarged or made smaller, fills centrally.
    """
    frames, height, width = x.shape[2:]
    size, deep = config.patch_size, config.patch_size_t
    count = torch.arange(-(-frames // (deep or 1)), device=x.device, dtype=torch.float32)
    grid = (height // size, width // size)
    if deep is not None:
        rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in grid)
        return count, rows, columns
    base = (config.sample_height // size, config.sample_width // size)
    scale = min(whole / n for whole, n in zip(base, grid, strict=True))
    ends = []
    for whole, n in zip(base, grid, strict=True):
        filled = round(scale * n)
        start = round((whole - filled) / 2)
        last = (start + filled) * (n - 1) / n
        ends.append(torch.linspace(start, last, n, device=x.device, dtype=torch.float32))
    return count, ends[0], ends[1]


def _angles(place: Tensor, width: int) -> Tensor:
    """Angles [N, width] of places [N]: each of width / 2 waves twice."""
    powers = torch.arange(0, width, 2, device=place.device, dtype=torch.float32) / width
    return torch.outer(place, SLOWEST**-powers).repeat_interleave(2, dim=1)

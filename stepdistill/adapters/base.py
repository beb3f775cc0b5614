"""Adapter: the only place that knows how a family of networks is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from stepdistill.adapters import scalars
from stepdistill.adapters.cond import Cond


class Adapter(ABC):
    """The signature of one family of networks.

    ``reads_text`` says whether it is told a prompt's embeddings, ``label_key`` names the entry of a
    network's config that counts its class labels, ``lora_targets`` the layers that low-rank
    adapters go to, those of them that a network has; see
    :func:`stepdistill.adapters.lora.matches`. ``innate`` holds patterns for the names of the
    parameters that GDD keeps as they are; empty where no rule is known.
    """

    reads_text: ClassVar[bool] = False
    label_key: ClassVar[str | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = ()
    innate: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Run ``call`` (the network, or a wrapper of it) on x [B, C, *S] at network times [B]."""

    @abstractmethod
    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """Shape of one sample without the batch."""

    def beside(self, net: nn.Module) -> int:
        """Channels of an image that the network is fed beside the state: those that it takes more
        than it gives; 0 for none."""
        config: Any = getattr(net, "config", None)
        taken, given = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
        return max(0, taken - given) if taken and given else 0

    def label_rows(self, net: nn.Module) -> int:
        """Labels that the network knows, without what :meth:`null_label` fixes; 0 if it takes none.

        Raises:
            ValueError: conditions of another kind than a table of class labels.
        """
        config: Any = net.config
        return int(config.get(self.label_key) or 0) if self.label_key else 0

    def null_label(self, net: nn.Module) -> int | None:
        """The label that means "no class", where the architecture itself fixes one."""
        return None

    def embeds_guidance(self, net: nn.Module) -> bool:
        """Whether the network itself is made to be told a guidance scale, by ``cond.guidance``."""
        return False

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """Names of modules whose outputs serve as features, about half way through."""
        return ()

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Names of modules whose outputs serve as features at several depths."""
        return self.taps(net)

    def feature(self, name: str, output: Any) -> Tensor:
        """What serves as the feature of a module that puts out one tensor or several."""
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """Names of the modules whose outputs are the network's embeddings of its time."""
        return ()

    def extend(self, net: nn.Module, numbers: Sequence[str]) -> None:
        """Have a network, which nobody shares, be told further numbers; at first it heeds none.

        Raises:
            ValueError: it is not known how a network of its class embeds its time.
        """
        places = self.embedders(net)
        if not places:
            raise ValueError(f"it is not known where {type(net).__name__} embeds its time")
        scalars.extend(net, numbers, places)

    def numbers(self, net: nn.Module) -> tuple[str, ...]:
        """The further numbers that a network is told."""
        return scalars.numbers(net)

    def telling(self, net: nn.Module, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Calls of the network in this context are told numbers [B], 0 to 1, by name."""
        extra = scalars.held(net)
        return nullcontext() if extra is None else extra.telling(values)


def spaced(names: Sequence[str]) -> tuple[str, ...]:
    """Up to four of these names, evenly spaced, the last among them."""
    count = min(4, len(names))
    return tuple(names[(k + 1) * len(names) // count - 1] for k in range(count))

"""Branch: the weights of a network, or of a low-rank adapter on a network that others share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stepdistill.adapters import Adapter, lora, scalars
from stepdistill.adapters.dropout import Drop

if TYPE_CHECKING:
    from typing_extensions import Self


class Branch(nn.Module):
    """What a denoiser is made of, to be copied, read, loaded and put on a shared network.

    Several may share one ``net``: each has its own adapter put on before it calls, and the bare
    network's none. ``lora`` is the name of the adapter; None means the network itself. ``fixed``
    names the network's parameters that are never trained. ``scale`` is the guidance that a network
    which is told it hears where nothing else is said. ``dropout`` is what its dropout layers drop,
    where a trainer says so.
    """

    net: nn.Module
    adapter: Adapter
    lora: str | None = None
    fixed: frozenset[str] = frozenset()
    scale: float = 1.0
    dropout: Drop | None = None
    _call: Callable[..., Any] | None = None

    def called(self) -> Callable[..., Any]:
        """What a call goes to: the network, or its wrapper, with this branch's adapter on."""
        lora.activate(self.net, self.lora)
        return self.net if self._call is None else self._call

    def branch(self, name: str | None) -> Self:
        """The same network with its adapter ``name``, or bare."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.lora, other._call = name, None
        return other

    def clone(self) -> Self:
        """A trainable copy with the same process, head and adapter, whose network is its own."""
        other = self.branch(None)
        other.net = lora.merged(self.net, self.lora).requires_grad_(True)
        other.fix(self.fixed)
        return other

    def extended(self, *numbers: str) -> Self:
        """A clone whose network is also told numbers, by name; for now it does not heed them.

        Raises:
            ValueError: it is not known how its network embeds its time.
        """
        other = self.clone()
        other.adapter.extend(other.net, numbers)
        return other

    def fix(self, names: Iterable[str]) -> None:
        """Take parameters of the network, by name, out of what is trained."""
        self.fixed = frozenset(names)
        for name, param in self.net.named_parameters():
            if name in self.fixed:
                param.requires_grad_(False)

    def adapt(
        self, name: str, *, rank: int, alpha: float, targets: Sequence[str] | None, seed: int
    ) -> Self:
        """A branch by a fresh adapter ``name``, which changes nothing yet; see :class:`LowRank`.

        Args:
            targets: None for those of the network's family.

        Raises:
            ValueError: this is a branch already, or a target matches no layer.
        """
        if self.lora is not None:
            raise ValueError(f"{self.lora} is an adapter and takes none itself")
        if targets is None:
            targets = lora.present(self.net, self.adapter.lora_targets)
        if not targets:
            raise ValueError(
                f"{type(self.net).__name__} has no layers that are adapted by default; name some"
            )
        lora.add(self.net, name, lora.LowRank(rank, alpha, tuple(targets), seed))
        return self.branch(name)

    def twin(self, name: str) -> Self:
        """A second set of weights, the same for now, such as an average.

        An adapter's is an adapter ``name`` on the same network, a network's is a network.
        """
        if self.lora is None:
            return self.clone()
        lora.twin(self.net, self.lora, name)
        return self.branch(name)

    def drop(self) -> None:
        """Free what is this branch's own; it is not to be called again."""
        if self.lora is not None:
            lora.remove(self.net, self.lora)

    def plain(self) -> nn.Module:
        """A network of the original class with these weights: itself, or a plain copy."""
        if scalars.held(self.net) is not None:
            return scalars.plain(self.net)
        return lora.merged(self.net, self.lora) if lora.shared(self.net) else self.net

    def own(self) -> list[Tensor]:
        """The parameters that are this branch's own to train."""
        if self.lora is None:
            return [p for name, p in self.net.named_parameters() if name not in self.fixed]
        return list(lora.parameters(self.net, self.lora).values())

    def weights(self) -> dict[str, Tensor]:
        """This branch's own tensors, buffers included, by name; not copied."""
        if self.lora is None:
            return lora.plain_state(self.net)
        return {k: v.detach() for k, v in lora.parameters(self.net, self.lora).items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`weights` gave.

        Raises:
            RuntimeError: for a network, weights of another one.
            ValueError: for an adapter, weights of other layers.
        """
        if self.lora is None:
            self.net.load_state_dict(weights)
        else:
            lora.load(self.net, self.lora, weights)

    def adopt(self, source: Branch) -> None:
        """Become what ``source`` is.

        Raises:
            ValueError: an adapter cannot become another network.
        """
        if self.lora is None:
            own = source.weights() if source.lora is None else source.plain().state_dict()
            self.net.load_state_dict(own)
        elif source.net is not self.net:
            raise ValueError(f"adapter {self.lora} cannot become a network that it does not share")
        elif source.lora is None:
            lora.reset(self.net, self.lora)
        else:
            lora.load(self.net, self.lora, lora.parameters(self.net, source.lora))

"""What a model's layers give for a batch, kept so that the layers before an edit need not run again.

Letters: B batch, T tokens, C model width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from attnzoo.heads.causal.batches import repeated


class LayerMemory:
    """The layers of a model, and what they gave for one batch.

    A layer is the largest module round one attention block alone. Where a forward calls each of them once, and in their
    order, those before an edited block give what they gave without the edit: they are called no more, and all else of
    the model is. Models of which that is not so run whole.

    Args:
        model: The model.
        paths: The names of its attention blocks, in order.
        size: B.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], size: int) -> None:
        self._layers = [model.get_submodule(path) for path in layer_paths(paths)]
        self._size = size
        self._gave: list[Any] = [None] * len(self._layers)
        self._order: list[int] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes what layers give while the model is called once."""
        with ExitStack() as restored:
            for number, layer in enumerate(self._layers):
                restored.callback(layer.register_forward_hook(self._noter(number)).remove)
            yield

    def _noter(self, number: int) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._order.append(number)
            self._gave[number] = output

        return note

    @property
    def usable(self) -> bool:
        """Whether each layer was called once, in order, and gave what can be given again."""
        in_order = self._order == list(range(len(self._layers)))
        return len(self._layers) > 1 and in_order and all(map(_is_known, self._gave))

    @contextmanager
    def before(self, layer: int, times: int) -> Iterator[None]:
        """Layers before one give what they gave, several times over, and compute nothing.

        Args:
            layer: Its index; nothing changes where the layers cannot be used.
            times: How often the batch is repeated.
        """
        chosen = self._layers[:layer] if self.usable else []
        own = [(module, module.__dict__.get("forward")) for module in chosen]
        try:
            for module, gave in zip(chosen, self._gave, strict=False):
                module.__dict__["forward"] = _giver(gave, self._size, times)
            yield
        finally:
            for module, forward in own:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


def layer_paths(paths: Sequence[str]) -> list[str]:
    """The names of the largest modules round one block each; nothing for a block that has none of its own."""
    found = []
    for path in paths:
        layer = path
        while True:
            outer = layer.rpartition(".")[0]
            if not outer or sum(other == outer or other.startswith(f"{outer}.") for other in paths) > 1:
                break
            layer = outer
        found.append(layer)
    return found


def _giver(gave: Any, size: int, times: int) -> Any:
    def give(*args: Any, **kwargs: Any) -> Any:
        # A copy, since a model may write into what its layers give.
        return repeated(gave, size, times) if times > 1 else _copied(gave)

    return give


def _copied(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(map(_copied, x))
    return x.clone() if isinstance(x, Tensor) else x


def _is_known(x: Any) -> bool:
    if type(x) in (tuple, list):
        return all(map(_is_known, x))
    return x is None or isinstance(x, Tensor)

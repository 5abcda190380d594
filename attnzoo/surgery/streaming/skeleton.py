"""A model whose layers stay in their files: one at a time is brought to memory, and let go again.

What does not belong to a layer (embeddings, the last norm, the head) stays in memory. Letters: B batch, T tokens, C
model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import checkpoint
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import check_fit
from attnzoo.surgery.lowrank.calibration import Batch, real_tokens, summed_loss
from attnzoo.surgery.lowrank.refit import EndOfRun
from attnzoo.surgery.sites import find
from attnzoo.surgery.streaming.shards import Shards
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class LayerCalls:
    """What a model calls its layers with for a batch.

    Attributes:
        hidden: What goes into the first one, ``[B, T, C]``.
        arguments: Of each layer by name, without hidden states.
    """

    hidden: Tensor
    arguments: list[dict[str, Any]]


class Skeleton:
    """A model in evaluation mode without its layers' weights.

    Args:
        folder: A plain checkpoint.
        dtype: Of the weights that will be written; ``None`` leaves each as it is stored.
        run_in: Of weights and activations while a text runs; ``None`` is that of the weights.

    Raises:
        ConversionError: If the checkpoint is missing, damaged or not to be trusted.
        UnsupportedError: If its attention blocks do not lie in the layers of one list.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None, run_in: torch.dtype | None = None) -> None:
        self.folder = folder
        self.not_finite: list[str] = []
        self._in_tuples = False
        config = checkpoint.read_config(folder)
        shards = Shards(folder)
        kind = run_in or dtype or shards.widest_dtype()
        self.model: Any = checkpoint.model_for(config, shards, dtype=kind, build=_without_weights)
        self.stored = checkpoint.named_as_model(self.model, shards.stored)
        own: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        check_fit(own, self.stored)
        self.written: dict[str, torch.dtype] = {}
        self.held: dict[str, torch.dtype] = {}
        for name, x in self.stored.items():
            floating = own[name].is_floating_point()
            as_stored = x.dtype if isinstance(x.dtype, torch.dtype) and floating else own[name].dtype
            self.written[name] = dtype if dtype is not None and floating else as_stored
            self.held[name] = run_in if run_in is not None and floating else self.written[name]
        for names in checkpoint.shared_names(self.model):
            known = next(name for name in names if name in self.stored)
            self.written |= {name: self.written[known] for name in names if name not in self.stored}
        checkpoint.finished(self.model, folder)
        self.layers = _layer_paths(self.model)
        self._refuse_shared()
        # A name in the files may stand for several of the model.
        self.outer = [name for name in own if not name.startswith(tuple(f"{path}." for path in self.layers))]
        for path in self.layers:
            self._let_go(self.names_of(path))
        self._bring_outer()

    def names_of(self, path: str) -> list[str]:
        """The names of a layer's tensors."""
        return [name for name in self.stored if name.startswith(f"{path}.")]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors from their files, in the dtypes that they will have."""
        found = Shards.read({name: self.stored[name] for name in names})
        self.not_finite += [n for n, x in found.items() if x.is_floating_point() and not bool(x.isfinite().all())]
        return {name: x.to(self.held[name]) for name, x in found.items()}

    def as_written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the dtypes in which they are written; names that the files do not have go by their neighbours'."""
        found = {}
        for name, x in tensors.items():
            dtype = self.written.get(name)
            if dtype is None:
                # kv_down.weight lies beside q_proj.weight, in a block whose weights are of one dtype.
                block = name.rsplit(".", 2)[0]
                dtype = next(kind for known, kind in self.written.items() if known.startswith(f"{block}."))
            found[name] = x.to(dtype) if x.is_floating_point() else x
        return found

    def forget_run(self) -> None:
        """Gives all tensors of the model the dtypes in which they are written; no text runs any more."""
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        first = {name: names[0] for names in checkpoint.shared_names(self.model) for name in names}
        new: dict[str, Tensor] = {}
        for name, x in self.as_written({name: x.detach() for name, x in state.items()}).items():
            _put(self.model, name, new.setdefault(first.get(name, name), nn.Parameter(x, requires_grad=False)))

    def warn_of_values(self) -> None:
        """Warns if what was read holds NaN or infinity."""
        bad = sorted(set(self.not_finite))
        if bad:
            warn_caller(f"{self.folder}: {bad[0]} and {len(bad) - 1} more tensors hold NaN or infinity")

    @contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """A layer with its weights."""
        names = self.names_of(path)
        for name, x in self.read(names).items():
            _put(self.model, name, x)
        try:
            yield self.model.get_submodule(path)
        finally:
            self._let_go(names)

    def calls(self, batch: Batch) -> LayerCalls:
        """What the model calls its layers with; none of them runs."""
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def keep(layer: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
            hidden.append(x)
            arguments.append(call)
            if len(arguments) == len(self.layers):
                raise EndOfRun
            return x

        with torch.no_grad(), self._instead(keep):
            try:
                self.model(**batch, use_cache=False)
            except EndOfRun:
                return LayerCalls(hidden[0].detach(), arguments)
        raise UnsupportedError(
            f"model: expected one that calls each of its {len(self.layers)} layers once, got one that called "
            f"{len(arguments)}"
        )

    def run(self, layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        """What a layer that is loaded makes of hidden states ``[B, T, C]``."""
        found = layer(hidden, **call)
        self._in_tuples = isinstance(found, tuple)
        after: Tensor = found[0] if isinstance(found, tuple) else found
        return after

    def loss_gradient(self, batch: Batch, last: Tensor) -> Tensor:
        """The gradient of the summed loss at what the last layer gives ``[B, T, C]``."""
        leaf = last.detach().requires_grad_()
        after = self.model.get_submodule(self.layers[-1])

        def answer(layer: nn.Module, x: Tensor, call: dict[str, Any]) -> Any:
            given = leaf if layer is after else x
            return (given,) if self._in_tuples else given

        with torch.enable_grad(), self._instead(answer):
            logits = self.model(**batch, use_cache=False).logits
            summed_loss(logits, batch["input_ids"], real_tokens(batch)).backward()
        if leaf.grad is None:
            raise UnsupportedError("model: expected logits that depend on what the last layer gives")
        return leaf.grad

    @contextmanager
    def _instead(self, answer: Callable[[nn.Module, Tensor, dict[str, Any]], Any]) -> Iterator[None]:
        """Answers in the layers' place."""
        layers = [self.model.get_submodule(path) for path in self.layers]
        for layer in layers:
            layer.forward = partial(_answer, answer, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _let_go(self, names: Sequence[str]) -> None:
        for name in names:
            _put(self.model, name, torch.empty(self.stored[name].shape, dtype=self.held[name], device="meta"))

    def _bring_outer(self) -> None:
        """Brings what belongs to no layer, tied tensors as one."""
        first = {name: names for names in checkpoint.shared_names(self.model) for name in names}
        done: set[str] = set()
        for name in self.outer:
            names = first.get(name, [name])
            if name in done:
                continue
            done.update(names)
            given = next(each for each in names if each in self.stored)
            x = self.read([given])[given]
            shared = nn.Parameter(x, requires_grad=False)
            for each in names:
                _put(self.model, each, shared)

    def _refuse_shared(self) -> None:
        inside = tuple(f"{path}." for path in self.layers)
        for names in checkpoint.shared_names(self.model):
            found = [name for name in names if name.startswith(inside)]
            if found:
                raise UnsupportedError(
                    f"model: expected layers with tensors of their own, got {found[0]!r}, which is {names[0]!r} too"
                )


def _answer(
    answer: Callable[[nn.Module, Tensor, dict[str, Any]], Any], layer: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Calls ``answer`` as a layer is called, with all arguments but hidden states by name."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    return answer(layer, call.pop(names[0]), call)


def _without_weights(config: dict[str, Any], *, dtype: torch.dtype) -> Any:
    """A model of a configuration whose parameters are on the meta device, and whose buffers are there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = checkpoint.model_of(config, dtype=dtype)
    # Parameters that were tied were replaced one by one.
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _layer_paths(model: nn.Module) -> tuple[str, ...]:
    """The paths of all layers of the list that the attention blocks lie in."""
    lists: dict[str, Site] = {}
    for site in find(model):
        words = site.path.split(".")
        prefixes = (".".join(words[:end]) for end in range(1, len(words)))
        found = [prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)]
        lists.setdefault(found[0] if found else "", site)
    if len(lists) != 1 or "" in lists:
        places = ", ".join(sorted(path or "none" for path in lists)) or "no attention blocks"
        raise UnsupportedError(f"model: expected attention blocks in the layers of one nn.ModuleList, got {places}")
    container = next(iter(lists))
    return tuple(f"{container}.{name}" for name, _ in model.get_submodule(container).named_children())


def _put(model: nn.Module, name: str, x: Tensor) -> None:
    """Puts a tensor into a model by its name in the state."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = x if isinstance(x, nn.Parameter) else nn.Parameter(x, requires_grad=False)
    else:
        module._buffers[leaf] = x.detach()

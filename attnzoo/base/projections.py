"""What a layer may know about its projections, whoever has wrapped, packed, sharded, hooked or moved them.

A projection is an ``nn.Linear`` until somebody replaces it. Its width is the configuration's unless a weight says that
only some heads are here; the dtype that a weight is stored in need not be the one that is computed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from attnzoo.base.config import AttentionConfig
from attnzoo_kernels.errors import ShapeError, UnsupportedError

COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that layers compute in, and that a cache's values may be kept in."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def rows_held(projection: nn.Module, rows: int, inputs: int) -> int:
    """Output features that a projection computes here: ``rows``, or a slice of them under tensor parallelism.

    Args:
        projection: From ``inputs`` features to ``rows`` by the configuration.
        rows: Output features of all heads.
        inputs: Input features, by which a packed or flattened weight is told from a matrix.
    """
    projection = _innermost(projection)
    weight = _weight(projection)
    if _is_distributed(weight):
        return rows // _slices(projection, weight)
    if _is_matrix(weight, inputs):
        return int(weight.shape[0])
    declared = getattr(projection, "out_features", None)
    return declared if isinstance(declared, int) and 0 < declared <= rows else rows


def columns_held(projection: nn.Module, columns: int) -> int:
    """Input features that a projection takes here: ``columns``, or a slice of them under tensor parallelism."""
    projection = _innermost(projection)
    weight = _weight(projection)
    if _is_distributed(weight):
        return columns // _slices(projection, weight)
    if weight is not None and type(projection) is nn.Linear and weight.dim() == 2 and weight.is_floating_point():
        return int(weight.shape[1])
    return columns


def slice_index(projection: nn.Module) -> int | None:
    """Which of the equal slices of a distributed projection is here; ``None`` where its weight does not say."""
    projection = _innermost(projection)
    weight = _weight(projection)
    if not _is_distributed(weight) or _slices(projection, weight) == 1:
        return None
    return int(weight.device_mesh.get_local_rank(weight.device_mesh.ndim - 1))


def computing_dtype(projections: Iterable[nn.Module], inputs: int) -> torch.dtype:
    """The dtype of what projections give: of a weight that is a matrix, else what a packed one is unpacked to.

    Args:
        projections: From ``inputs`` features; the first that says something decides.
        inputs: Input features.
    """
    inner = [_innermost(projection) for projection in projections]
    for projection in inner:
        weight = _weight(projection)
        if weight is not None and weight.dtype in COMPUTED and (_is_distributed(weight) or _is_matrix(weight, inputs)):
            found: torch.dtype = weight.dtype
            return found
    for projection in inner:
        declared = getattr(projection, "compute_dtype", None)
        held = (x.dtype for x in projection.parameters() if x.dtype in COMPUTED)
        dtype = declared if declared in COMPUTED else next(held, None)
        if dtype is not None:
            return dtype
    return torch.get_default_dtype()


def computing_device(projections: Iterable[nn.Module]) -> torch.device:
    """Where projections compute: with their weights, or where a hook brings weights that lie elsewhere."""
    inner = [_innermost(projection) for projection in projections]
    for projection in inner:
        for hook in _placing_hooks(projection):
            execution = getattr(hook, "execution_device", None)
            if execution is not None:
                return torch.device(execution)
    tensors = [x for projection in inner for x in (_weight(projection), *projection.parameters()) if x is not None]
    here = [x.device for x in tensors if x.device.type != "meta"]
    devices = here or [x.device for x in tensors]
    return devices[0] if devices else torch.get_default_device()


def heads_held(name: str, projection: nn.Module, heads: int, config: AttentionConfig) -> int:
    """Of a projection's ``heads``, how many are here.

    Raises:
        ShapeError: If what is here are no whole heads.
    """
    width = config.head_width
    rows = rows_held(projection, heads * width, config.dim)
    if rows % width or not 0 < rows <= heads * width:
        raise ShapeError(
            f"{name}: expected {heads * width} output features, or a slice of whole heads of {width}, got {rows}"
        )
    return rows // width


def check_slice(config: AttentionConfig, held: tuple[int, int, int], o_proj: nn.Module | None, given: int) -> None:
    """Raises unless some of the heads fit together.

    Args:
        config: Of the whole layer.
        held: Query, key and value heads that are here.
        o_proj: The output's projection; ``None`` where no module alone does its work, which then takes all heads.
        given: Features that the heads here give it.

    Raises:
        ShapeError: If keys, values or the output's projection are sliced otherwise than queries.
    """
    queries = held[0]
    whole = config.kv_heads
    groups, rest = divmod(queries * whole, config.num_heads)
    # One KV head for all queries is whole in every slice.
    expected = 1 if whole == 1 else groups
    for name, found in zip(("k_proj", "v_proj"), held[1:], strict=True):
        if found != expected or (rest and whole > 1):
            raise ShapeError(
                f"{name}: expected {expected} of {whole} KV heads beside {queries} of {config.num_heads} query heads, "
                f"whole groups of them, got {found}; slice q_proj, k_proj and v_proj alike"
            )
    columns = config.num_heads * config.head_width
    taken = columns if o_proj is None else columns_held(o_proj, columns)
    if taken != given:
        raise ShapeError(
            f"o_proj: expected to take {given} features, of {queries} heads as q_proj gives, got {taken}; slice it by "
            "columns (RowwiseParallel)"
        )


def check_restart(layer: nn.Module) -> None:
    """Raises unless every module within a layer that has weights can start them anew.

    Raises:
        UnsupportedError: Naming the module that cannot.
    """
    for path, module in layer.named_modules():
        has_weights = next(module.parameters(recurse=False), None) is not None
        if path and has_weights and not hasattr(module, "reset_parameters"):
            raise UnsupportedError(
                f"{path}: expected a module with reset_parameters, got {type(module).__name__}; start it by itself"
            )


def is_distributed(projection: nn.Module) -> bool:
    """Whether tensor parallelism has divided a projection among processes."""
    return bool(getattr(projection, "_distribute_module_applied", False))


def takes_its_own_dtype(projection: nn.Module) -> bool:
    """Whether a projection is a plain product whose input must have its weight's dtype: nothing casts either."""
    return (
        type(projection) is nn.Linear
        and not projection._forward_pre_hooks
        and "forward" not in vars(projection)
        and isinstance(projection.weight, Tensor)
        and projection.weight.dtype in COMPUTED
    )


def is_untouched(projection: nn.Module, x: Tensor) -> bool:
    """Whether its weight may be read instead of calling it: an ``nn.Linear`` that nobody wrapped, hooked or moved."""
    if type(projection) is not nn.Linear:
        return False
    # Past the module's look-up, which takes longer than a small product.
    held = vars(projection)
    if any(held[name] for name in _HOOKS) or any(getattr(nn.modules.module, name) for name in _ALL_HOOKS):
        return False
    weight = held["_parameters"].get("weight")
    return "forward" not in held and type(weight) is nn.Parameter and weight.device == x.device


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody has put something round the calls of a module, as long as no gradients are wanted."""
    held = vars(module)
    if "forward" in held or held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return False
    return not (nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def are_products(projections: Iterable[tuple[nn.Module, int]], x: Tensor) -> bool:
    """Whether calling each on a CPU is a product with its own weight and no more, to so many features, as x is.

    As long as no gradients are wanted. Reads attributes past the module's look-up: it is asked at each decoding step.
    """
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return False
    dtype = x.dtype
    device = x.device
    for projection, rows in projections:
        held = vars(projection)
        if type(projection) is not nn.Linear or "forward" in held:
            return False
        if held["_forward_hooks"] or held["_forward_pre_hooks"]:
            return False
        weight = held["_parameters"].get("weight")
        if type(weight) is not nn.Parameter or weight.shape[0] != rows:
            return False
        if weight.dtype != dtype or weight.device != device:
            return False
    return True


def is_plain(projection: nn.Module, x: Tensor) -> bool:
    """Whether a projection is nothing but the product with its weight, in the precision of x, single or double."""
    return (
        is_untouched(projection, x)
        and projection.weight.dtype == x.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _innermost(projection: nn.Module) -> nn.Module:
    """The projection that adapters have been put round."""
    base = getattr(projection, "base_layer", None)
    while isinstance(base, nn.Module):
        projection = base
        base = getattr(base, "base_layer", None)
    return projection


def _weight(projection: nn.Module) -> Any:
    """The weight where it is a tensor; of a parametrized one, what it is made from, since making it may change it."""
    if is_parametrized(projection, "weight"):
        return next(projection.parametrizations.weight.parameters(), None)  # type: ignore[union-attr]
    weight = getattr(projection, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _is_distributed(weight: Any) -> bool:
    return hasattr(weight, "placements") and hasattr(weight, "device_mesh")


def _is_matrix(weight: Any, inputs: int) -> bool:
    """Whether a weight is ``[rows, inputs]`` and no packed form or flat shard of it."""
    return weight is not None and weight.dim() == 2 and weight.is_floating_point() and weight.shape[1] == inputs


def _slices(projection: nn.Module, weight: Any) -> int:
    """Among how many processes a distributed projection's heads are divided.

    Sharded parameters (FSDP) are whole again when they are used. Tensor parallelism marks the modules that it makes,
    since they must handle their inputs and outputs, and its mesh is the last dimension where both are at work.
    """
    if not is_distributed(projection):
        return 1
    last = weight.device_mesh.ndim - 1
    return int(weight.device_mesh.size(last)) if weight.placements[last].is_shard() else 1


def _placing_hooks(projection: nn.Module) -> tuple[Any, ...]:
    """The hooks of a library that keeps weights elsewhere between calls."""
    hook = getattr(projection, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))

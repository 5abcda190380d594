"""Whether a layer computes right: no time is given of one that does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnzoo.base.layer import AttentionLayer
from attnzoo.evaluation.cost_setting import BOUND, Cost, CostSetting
from attnzoo.evaluation.ten_lines import TenLines
from attnzoo_kernels.errors import UnsupportedError

CHECKED_SCORES = 2**26
"""Scores that the reference may hold at once: longer inputs are checked on their first tokens."""

LEAST_VALUE = 1e-2
"""What counts as the largest value where all are smaller: gradients that cancel are nothing but roundings."""


def check(name: str, layer: AttentionLayer, setting: CostSetting) -> Cost:
    """Density and error of a layer, and the problem where it differs from the reference implementation.

    Training, gradients, a forward pass and a decoding step, with the same weights, inputs and cache.
    """
    tokens = checked_tokens(setting, layer.config.num_heads)
    try:
        found, wanted = (_results(layer, impl, setting, tokens) for impl in (setting.impl, "reference"))
    except UnsupportedError as error:
        return Cost(name, problem=str(error))
    cost = _compared(name, found, wanted, setting)
    cost.checked = tokens
    with torch.no_grad():
        cost.density = layer.eval().attend(setting.inputs(setting.tokens)).plan.density
    return cost


def check_baseline(name: str, baseline: TenLines, anchor: AttentionLayer, setting: CostSetting) -> Cost:
    """The same of ten lines of torch, which take the weights of ``mha`` and are held to its reference."""
    baseline.load_state_dict(anchor.state_dict())
    anchor.impl = "reference"
    tokens = checked_tokens(setting, setting.num_heads)
    x = setting.inputs(tokens)
    cache = baseline.new_cache(setting.batch, tokens)
    with torch.no_grad():
        baseline.eval()(x[:, : tokens - 1], cache)
        found = {"decode": baseline(x[:, tokens - 1 :], cache, tokens - 1), "forward": baseline(x)}
    cost = _compared(name, found | _trained(baseline, x), _results(anchor, "reference", setting, tokens), setting)
    cost.checked = tokens
    cost.density = 1.0
    return cost


def checked_tokens(setting: CostSetting, heads: int) -> int:
    """How many tokens are checked: all, where the reference may hold so many scores."""
    return min(setting.tokens, max(2, int((CHECKED_SCORES / (setting.batch * heads)) ** 0.5)))


def _compared(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], setting: CostSetting) -> Cost:
    errors = {what: _difference(found[what], wanted[what]) for what in wanted}
    worst = max(errors, key=lambda what: errors[what])
    bound = BOUND[setting.dtype]
    problem = None
    if errors[worst] > bound:
        problem = f"wrong: {worst} is off by {errors[worst]:.1e} of the largest value, {bound:.0e} is right"
    return Cost(name, error=errors[worst], problem=problem)


def _results(layer: AttentionLayer, impl: str, setting: CostSetting, tokens: int) -> dict[str, Tensor]:
    """Everything that a layer computes, by name; what a decoding step finds in its cache does not depend on impl."""
    x = setting.inputs(tokens)
    cache = layer.new_cache(setting.batch, tokens, device=setting.device, dtype=setting.dtype)
    with torch.no_grad():
        layer.eval()(x[:, : tokens - 1], cache=cache)
    layer.impl = impl
    try:
        with torch.no_grad():
            found = {"decode": layer(x[:, tokens - 1 :], cache=cache), "forward": layer(x)}
        return found | _trained(layer, x)
    finally:
        layer.impl = setting.impl


def _trained(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a training step computes, by name."""
    names = ("x", *(name for name, _ in _weights(layer)))
    out, gradients = train(layer.train(), x.detach().requires_grad_())
    by_name = {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}
    return {"training": out.detach(), **by_name}


def train(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and gradients of x and all weights, those of an auxiliary loss included."""
    out, aux = _outcome(layer, x)
    leaves = [x, *(weight for _, weight in _weights(layer))]
    ends = [out]
    weights = [torch.ones_like(out)]
    if aux is not None and aux.requires_grad:
        ends = [*ends, aux]
        weights = [*weights, torch.ones_like(aux)]
    return out, torch.autograd.grad(ends, leaves, weights, materialize_grads=True, allow_unused=True)


def _outcome(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output, and an auxiliary loss where there is one."""
    if not isinstance(layer, AttentionLayer):
        return layer(x), None
    result = layer.attend(x)
    return result.out, result.plan.aux_loss


def _weights(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in layer.named_parameters() if weight.requires_grad]


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where it is no number."""
    worst = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=LEAST_VALUE))
    return math.inf if math.isnan(worst) else worst

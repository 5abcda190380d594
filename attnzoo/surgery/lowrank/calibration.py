"""What a calibration text says about each attention site: second moments of inputs and of gradients, in one pass.

Letters: B batch, T tokens, C model width, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo.surgery.hosts.block import AttentionBlock
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank import losses
from attnzoo_kernels.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Batch = dict[str, Tensor]


@dataclass(eq=False)
class SiteStatistics:
    """Sums over calibration tokens at one site, fp64; an input has a constant 1 appended where the site has biases.

    Attributes:
        moment: Sum of ``x^T x``, ``[C, C]``.
        first: The same over the first token of each sequence: the attention sink.
        weighted: The same with each token weighted by the squared gradient at its keys and values.
        fisher: Sum of ``g^T g`` over the gradients at keys and values before rotation, ``[2 G D, 2 G D]``.
        token_weight: For each batch, the squared gradients ``[B, T]``.
        tokens: Tokens in the sums.
        sequences: Sequences in ``first``.
    """

    moment: Tensor
    first: Tensor
    weighted: Tensor | None = None
    fisher: Tensor | None = None
    token_weight: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    sequences: int = 0

    @classmethod
    def empty(cls, inputs: int) -> SiteStatistics:
        """Sums over nothing, of so many inputs."""
        zero = torch.zeros(inputs, inputs, dtype=torch.float64, device="cpu")
        return cls(zero, zero.clone())

    def mean_moment(self) -> Tensor:
        """The second moment of a token's input."""
        return self.moment / max(self.tokens, 1)

    def sink_moment(self, share: float = 0.1) -> Tensor:
        """The mean moment with the first token's added: attention reads it far more often than others."""
        return self.mean_moment() + self.first * (share / max(self.sequences, 1))

    def loss_moment(self) -> Tensor:
        """Half the gradient-weighted moment, half the plain one; without gradients the moment with the sink added."""
        plain = self.mean_moment()
        if self.weighted is None:
            return self.sink_moment()
        trace = self.weighted.trace()
        if float(trace) == 0:
            return self.sink_moment()
        return (self.weighted * (plain.trace() / trace) + plain) / 2

    def mean_fisher(self) -> Tensor | None:
        """The Fisher matrix of a token's keys and values, or ``None`` without gradients."""
        return None if self.fisher is None else self.fisher / max(self.tokens, 1)


@dataclass(eq=False)
class Statistics:
    """Statistics of all sites, with the batches they come from."""

    sites: Mapping[str, SiteStatistics]
    batches: list[Batch]
    with_gradients: bool

    def without_gradients(self) -> Statistics:
        """What would have been collected without a backward pass."""
        plain = {path: replace(site, weighted=None, fisher=None, token_weight=[]) for path, site in self.sites.items()}
        return Statistics(plain, self.batches, with_gradients=False)

    def check(self, site: Site, *, biases: bool) -> None:
        """Raises unless these are statistics of a site of these sizes.

        Raises:
            ConfigError: If the site is missing or of other sizes.
        """
        known = self.sites.get(site.path)
        if known is None:
            raise ConfigError(f"calibration: expected statistics of every site, got none of {site.path}")
        sizes = [("inputs", known.moment, site.width + int(biases))]
        if known.fisher is not None:
            sizes.append(("keys and values", known.fisher, 2 * site.kv_heads * site.head_dim))
        for what, matrix, size in sizes:
            if matrix.shape != (size, size):
                raise ConfigError(
                    f"calibration: expected statistics of {size} {what} at {site.path}, got {matrix.shape[0]}; "
                    "they come from another model"
                )


def as_batches(calibration: Iterable[Any]) -> list[Batch]:
    """Batches of ids as keyword arguments for the model.

    Args:
        calibration: int64 ids ``[B, T]`` or ``[T]``, or mappings of keyword arguments with ``input_ids``, or with
            ``pixel_values``.

    Raises:
        ConfigError: If there is no batch, or one is neither.
    """
    batches: list[Batch] = []
    for item in calibration:
        if isinstance(item, Mapping):
            batch = dict(item)
            odd = sorted(name for name, value in batch.items() if not isinstance(value, Tensor))
            if odd:
                raise ConfigError(f"calibration: expected tensors, got {type(batch[odd[0]]).__name__} as {odd[0]!r}")
        elif isinstance(item, Tensor):
            batch = {"input_ids": item}
        else:
            raise ConfigError(f"calibration: expected tensors of ids or mappings, got {type(item).__name__}")
        if "pixel_values" in batch:
            batches.append(batch)
            continue
        ids = batch.get("input_ids")
        if ids is None or ids.is_floating_point() or ids.dim() not in (1, 2) or ids.numel() == 0:
            got = None if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise ConfigError(f"calibration: expected input_ids of integers [B, T], got {got}")
        batches.append(
            _checked({name: value.view(1, -1) if value.dim() == 1 else value for name, value in batch.items()})
        )
    if not batches:
        raise ConfigError("calibration: expected at least one batch, got none")
    return batches


def _checked(batch: Batch) -> Batch:
    """A batch whose mask fits its ids, in tensors that autograd may keep."""
    shape = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != shape:
        raise ConfigError(
            f"calibration: expected an attention_mask {list(shape)} as input_ids has it, got {list(mask.shape)}"
        )
    if mask is not None and not bool(mask.any()):
        raise ConfigError("calibration: expected a token in every batch, got one that is all padding")
    return {name: value.clone() if value.is_inference() else value for name, value in batch.items()}


def real_tokens(batch: Batch, like: Tensor | None = None) -> Tensor:
    """Which tokens are no padding, bool ``[B, T]``.

    Args:
        batch: The batch.
        like: What a site sees ``[B, T, C]``, for batches that are not of ids: of their tokens all are real.
    """
    if "input_ids" not in batch and like is not None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def in_full(x: Tensor) -> Tensor:
    """At least fp32: products of half-precision activations would overflow, and fp64 models keep their precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_constant(x: Tensor, constant: bool) -> Tensor:
    """Inputs ``[n, C]``, with a constant 1 appended where the site has biases."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], 1) if constant else x


def has_biases(attention: nn.Module) -> bool:
    """Whether a projection of q, k or v has a bias."""
    projections = block_of(attention).projections
    return any(projections[name].bias is not None for name in ("q_proj", "k_proj", "v_proj"))


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Iterable[Any],
    *,
    gradients: bool = True,
    progress: Progress | None = None,
) -> Statistics:
    """Runs the calibration text through the model and sums up what the sites see; inference mode does not reach in.

    Args:
        model: A causal language model; it is left as it was.
        sites: Where to look.
        calibration: Ids, see :func:`as_batches`.
        gradients: Also run backward, for Fisher matrices and gradient-weighted moments.
        progress: Told of each batch.

    Raises:
        ConfigError: If there are no sites, of which nothing could be learned.
    """
    if not sites:
        raise ConfigError("sites: expected at least one attention block, got none")
    with torch.inference_mode(False):
        return _collect(model, sites, as_batches(calibration), gradients=gradients, progress=progress)


def _collect(
    model: nn.Module, sites: Sequence[Site], batches: list[Batch], *, gradients: bool, progress: Progress | None
) -> Statistics:
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    found: dict[str, SiteStatistics] = {}
    for site in sites:
        found[site.path] = SiteStatistics.empty(site.width + int(has_biases(modules[site.path])))
    with evaluating(model):
        for done, batch in enumerate(batches):
            _collect_batch(model, modules, batch, found, gradients=gradients)
            if progress is not None:
                progress("statistics", done + 1, len(batches))
    return Statistics(found, batches, gradients)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Evaluation mode with frozen weights; both are put back."""
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, was in training.items():
            module.training = was


@dataclass(eq=False)
class SiteRun:
    """What has passed through sites in one run: their inputs, and their keys and values, where gradients will be."""

    modules: Mapping[str, nn.Module]
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]

    def add_to(self, found: Mapping[str, SiteStatistics], real: Tensor) -> None:
        """Adds the run to the sums of its sites."""
        for path, module in self.modules.items():
            site = found[path]
            block = block_of(module)
            each = len(self.outputs[path]) // len(self.inputs[path])
            # A block that a model applies several times has as many inputs.
            for call, x in enumerate(self.inputs[path]):
                grads = _at_keys_and_values(block, self.outputs[path][call * each : (call + 1) * each])
                _add(site, x, real, grads, constant=site.moment.shape[0] > x.shape[-1])


@contextmanager
def watched_sites(modules: Mapping[str, nn.Module], *, gradients: bool) -> Iterator[SiteRun]:
    """Keeps what passes through attention blocks, by path."""
    seen = SiteRun(modules, {path: [] for path in modules}, {path: [] for path in modules})
    with ExitStack() as hooks:
        for path, module in modules.items():

            def keep_input(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                if gradients and not args[0].requires_grad:
                    # Weights are frozen: the graph begins here where no embedding has begun it.
                    args[0].requires_grad_()
                seen.inputs[path].append(args[0].detach())

            def keep_output(_: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                output.retain_grad()
                seen.outputs[path].append(output)

            projections = block_of(module).projections
            hooks.callback(projections["k_proj"].register_forward_pre_hook(keep_input).remove)
            if gradients:
                for projection in dict.fromkeys((projections["k_proj"], projections["v_proj"])):
                    hooks.callback(projection.register_forward_hook(keep_output).remove)
        yield seen


def _collect_batch(
    model: nn.Module, modules: dict[str, nn.Module], batch: Batch, found: dict[str, SiteStatistics], *, gradients: bool
) -> None:
    causal = all(block_of(module).causal for module in modules.values())
    with watched_sites(modules, gradients=gradients) as seen, ExitStack() as hooks:
        if gradients and causal and hasattr(model, "get_input_embeddings"):
            # Weights are frozen: the graph begins at the embeddings, so that no weight gradient is computed.
            embedding = cast(Any, model).get_input_embeddings()
            hooks.callback(embedding.register_forward_hook(lambda m, a, y: y.requires_grad_()).remove)
        with torch.set_grad_enabled(gradients):
            out = losses.run(model, batch, causal=causal)
            real = real_tokens(batch, next(iter(seen.inputs.values()))[0])
            if gradients and causal:
                summed_loss(getattr(out, "logits", out), batch["input_ids"], real).backward()
            elif gradients:
                losses.in_random_directions(out, real).backward()
    seen.add_to(found, real)


def summed_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Negative log-likelihood of every token that follows a real one, in nats, summed."""
    target = ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    return cross_entropy(in_full(logits[:, :-1]).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")


def first_tokens(real: Tensor) -> Tensor:
    """The first real token of each sequence, bool ``[B, T]``."""
    return real & (real.cumsum(1) == 1)


def _at_keys_and_values(block: AttentionBlock, outputs: list[Tensor]) -> Tensor | None:
    """Gradients at what a block's modules have projected, those at keys before those at values ``[B, T, 2 G D]``."""
    if not outputs:
        return None
    grads = [output.grad if output.grad is not None else torch.zeros_like(output) for output in outputs]
    if block.split is not None:
        _, *grads = block.split(grads[0])
    return torch.cat(grads, -1)


def _add(site: SiteStatistics, x: Tensor, real: Tensor, both: Tensor | None, *, constant: bool) -> None:
    rows = with_constant(in_full(x[real]), constant)
    first = with_constant(in_full(x[first_tokens(real)]), constant)
    site.moment += (rows.T @ rows).double().cpu()
    site.first += (first.T @ first).double().cpu()
    site.tokens += rows.shape[0]
    site.sequences += first.shape[0]
    if both is None:
        return
    grads = in_full(both[real])
    weight = grads.square().sum(-1)
    weighted = (rows * weight.unsqueeze(1)).T @ rows
    fisher = grads.T @ grads
    # In place: a sum made anew would hold each matrix twice.
    site.weighted = _added(site.weighted, weighted)
    site.fisher = _added(site.fisher, fisher)
    full = torch.zeros(real.shape, dtype=torch.float64, device="cpu")
    full[real.cpu()] = weight.double().cpu()
    site.token_weight.append(full)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    found = part.double().cpu()
    return found if total is None else total.add_(found)

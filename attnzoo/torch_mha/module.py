"""torch's ``nn.MultiheadAttention`` with any variant of attnzoo inside.

Source: ``torch.nn.MultiheadAttention`` (torch 2.13): arguments, parameters, their first values, and what masks mean.

Departures:

- A query with nothing to read gives the output's bias; torch gives NaN when weights are asked for. Weights are 0 there.
- ``is_causal=True`` needs no mask where there are as many keys as queries.
- ``is_causal=True`` beside a mask ``[T, T]`` is taken at its word, as torch takes it without padding.
- Heads are at most 256 wide.
- Nothing here is passed to torch's fused encoder layers ("fast path"), which would not ask what is inside. Nested
  tensors, which ``nn.TransformerEncoder`` makes of padded batches, are taken, of the layout ``torch.strided``.
- Variants other than plain attention compute no weights, drop nothing, and take no masks but padding and causal ones;
  padded tokens come out as 0 before the residual. What cannot be honoured raises.

Letters: B batch, T query tokens, S key tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.inputs import check_dtype
from attnzoo.base.layer import AttentionInputs, AttentionLayer
from attnzoo.base.padding import take_rows
from attnzoo.base.steps import AttentionOutput
from attnzoo.torch_mha import dense, inside, masks
from attnzoo.torch_mha.call import TorchCall, TorchSizes, read_call, refuse_jagged
from attnzoo.torch_mha.packed import WEIGHTS, PackedModule
from attnzoo_kernels.errors import UnsupportedError


class MultiheadAttention(PackedModule):
    """Multi-head attention with torch's constructor, forward and state dict, and a variant of attnzoo inside.

    State dicts go both ways, strictly. Weights that a variant has beside torch's (``moh``, ``rcmha``) are under
    ``layer.``. The same seed gives the same first weights as torch's.

    Plain attention (``variant="mha"`` without a window or rotation) takes everything that torch's does: padding and
    causal masks by the block-sparse operation; a mask of any numbers for pairs, and dropout, by torch's
    ``scaled_dot_product_attention``; where weights are asked for, by products and a softmax. In training, dropout draws
    the same numbers as torch's does.

    Other variants attend to their own tokens (``query is key``), and ``mha`` and ``moh`` without a window to others'
    too (``key is value``). They honour padding and causal masks: ``is_causal``, or a mask that is the causal one.

    Args:
        embed_dim: Model width C.
        num_heads: Heads H, a divisor of C.
        dropout: Of attention weights, in training. Only plain attention drops.
        bias: Whether the projections have biases.
        add_bias_kv: Whether a key and a value that are learned stand behind the others.
        add_zero_attn: Whether a key and a value of zeros do.
        kdim: Width of keys; ``None`` means C.
        vdim: Width of values; ``None`` means C.
        batch_first: Whether tokens are ``[B, T, C]`` rather than ``[T, B, C]``.
        device: Where the weights lie.
        dtype: Of the weights.
        variant: What is inside.
        **options: Fields of the variant's configuration, ``rotary`` and ``scale`` among them. A call is causal or not;
            ``causal=True`` takes causal ones alone, and is needed for those of ``rcmha``, whose convolutions have other
            weights then.

    Attributes:
        layer: The variant's layer, which has no weights but those that are its own.

    Raises:
        ConfigError: If an argument or option is unknown or does not fit.
        UnsupportedError: If the variant cannot have what torch's arguments ask for.

    Example:
        >>> attend = MultiheadAttention(64, 4, batch_first=True, variant="s2", block_size=16, local_blocks=2)
        >>> x = torch.randn(2, 100, 64)
        >>> attend(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 100, 64])
    """

    layer: AttentionLayer

    def __init__(  # noqa: PLR0913  (torch's own arguments, which may be given by place)
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str = "mha",
        **options: Any,
    ) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        check_int("num_heads", num_heads, 1)
        for name, flag in (("bias", bias), ("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            check_bool(name, flag)
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        sizes = {"dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_heads, "bias": bias}
        config = inside.config_of(variant, sizes, options)
        self.head_dim = config.head_width
        # What no other option changes: a rotation, a window, or another variant.
        self.is_plain = variant == "mha" and config.rotary is None and getattr(config, "window", None) is None
        self._check_variant(add_bias_kv)
        self.make_weights(bias, add_bias_kv, {"device": device, "dtype": dtype})
        self._put_inside(config, device, dtype)

    def _check_variant(self, add_bias_kv: bool) -> None:
        if self.is_plain:
            return
        for name, found, wanted in (
            ("add_bias_kv", add_bias_kv, False),
            ("add_zero_attn", self.add_zero_attn, False),
            ("kdim", self.kdim, self.embed_dim),
            ("vdim", self.vdim, self.embed_dim),
        ):
            if found != wanted:
                raise UnsupportedError(
                    f"{name}: expected {wanted}, got {found}: only plain attention ('mha' without a window or "
                    "rotation) takes it"
                )

    def _put_inside(
        self, config: AttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self.layer = inside.build_layer(config, self, device, dtype)
        twin = self.layer if config.causal else inside.causal_twin(self.layer)
        # Not registered: its weights are the layer's.
        self.__dict__["_for_causal"] = twin

    @classmethod
    def around(cls, module: Any, variant: str = "mha", *, dropout: float | None = None, **options: Any) -> Self:
        """A module round the very weights of ``nn.MultiheadAttention``, or of another of this class.

        Weights of the variant's own, if it has some, lie beside the others and are new.

        Args:
            module: Whose weights; it is untouched, and the output's projection is a part of both.
            variant: What is inside.
            dropout: In place of the module's own.
            **options: As to the constructor.
        """
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout if dropout is None else dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
            variant=variant,
            **options,
        )
        for name in WEIGHTS:
            new.register_parameter(name, getattr(module, name))
        new.out_proj = module.out_proj
        like = module.out_proj.weight
        if next(new.layer.parameters(), None) is not None:
            new._put_inside(new.layer.config, like.device, like.dtype)
        # The projection is the module's own, and keeps its mode.
        new.training = module.training
        new._set_mode(module.training)
        return new

    @property
    def variant(self) -> str:
        """The name of the variant inside."""
        return self.layer.config.kind

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, by which ``nn.TransformerEncoderLayer`` knows that it must call this module."""
        return False

    def train(self, mode: bool = True) -> Self:
        """As every module's."""
        super().train(mode)
        self._set_mode(mode)
        return self

    def _set_mode(self, mode: bool) -> None:
        self.layer.train(mode)
        twin = self.__dict__["_for_causal"]
        if isinstance(twin, AttentionLayer):
            twin.training = mode

    def extra_repr(self) -> str:
        """What torch's arguments say."""
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the module, as torch's.

        Args:
            query: ``[B, T, C]`` with ``batch_first``, else ``[T, B, C]``; or ``[T, C]``. Or a nested tensor that is
                key and value too.
            key: ``[B, S, kdim]``, in the same way.
            value: ``[B, S, vdim]``, in the same way.
            key_padding_mask: ``[B, S]`` or ``[S]``, bool, true at padding, or numbers to add to a key's scores.
            need_weights: Whether to give the weights too. Only plain attention does.
            attn_mask: ``[T, S]`` or ``[B * H, T, S]``, bool, true where a pair is hidden, or numbers to add.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal: Whether ``attn_mask`` is the causal mask; it may then be left away.

        Returns:
            The output as the query is, and the weights ``[B, T, S]`` or ``[B, H, T, S]``, or ``None``.

        Raises:
            TypeError: If an argument is no tensor, or of the wrong kind of dtype.
            ShapeError: If shapes do not fit.
            UnsupportedError: If the variant inside cannot honour a mask, or gives no weights, or drops nothing.
        """
        tokens = (query, key, value)
        if any(isinstance(x, Tensor) and x.is_nested for x in tokens):
            nested = refuse_jagged(
                tokens, batch_first=self.batch_first, masked=key_padding_mask is not None or attn_mask is not None
            )
            return self._attend_nested(nested, need_weights, average_attn_weights, is_causal)
        sizes = TorchSizes(
            query=self.embed_dim, key=self.kdim, value=self.vdim, heads=self.num_heads, batch_first=self.batch_first
        )
        call = read_call(sizes, tokens, key_padding_mask=key_padding_mask, attn_mask=attn_mask, is_causal=is_causal)
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_dtype(name, x, self.out_proj.weight)
        if self.is_plain:
            out, weights = self._attend_plain(call, need_weights)
        else:
            self._refuse_weights(need_weights)
            out = self._attend_variant(call)
            weights = None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not call.is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1).contiguous(), weights

    def _attend_plain(self, call: TorchCall, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(call.query, call.key, call.value)
        k, v = self.with_more_keys(k, v)
        more = k.shape[2] - call.key.shape[1]
        padding = masks.padded(call.key_padding, more)
        pairs = masks.padded(call.attn_mask, more)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if pairs is None and not (need_weights or dropout_p or (call.causal and more)):
            # The block-sparse operation knows causality and hidden keys.
            out = self._operate(AttentionInputs(q, k, v, key_bias=_bias(padding, q)), causal=call.causal)
        else:
            if call.causal:
                pairs = masks.padded(masks.causal_mask(q.shape[2], q), more)
            mask = masks.joined(pairs, padding, q.dtype)
            scale = self.layer.config.scale
            if need_weights:
                out, weights = dense.attend_with_weights(q, k, v, mask, dropout_p=dropout_p, scale=scale)
            else:
                out = dense.attend(q, k, v, mask, dropout_p=dropout_p, scale=scale)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), weights

    def _operate(self, inputs: AttentionInputs, *, causal: bool) -> Tensor:
        """The operation, by the plan of the layer inside."""
        layer = self._layer(causal)
        plan = layer.plan_for(inputs, offset=0)
        self._note(layer, AttentionOutput(inputs.q, plan))
        return layer.operate(inputs, plan)

    def _layer(self, causal: bool) -> AttentionLayer:
        """The layer for calls of this causality.

        Raises:
            UnsupportedError: If the variant, with these options, has none.
        """
        if not causal:
            if self.layer.config.causal:
                raise UnsupportedError(
                    f"is_causal: expected True, or the causal mask, with {self.variant!r}, which reads what came "
                    "before alone, got a call that is not causal"
                )
            return self.layer
        twin: AttentionLayer | str = self.__dict__["_for_causal"]
        if isinstance(twin, str):
            raise UnsupportedError(f"is_causal: expected False with these options of {self.variant!r}: {twin}")
        if twin.impl != self.layer.impl:
            twin.impl = self.layer.impl
        return twin

    def _note(self, layer: AttentionLayer, result: AttentionOutput) -> None:
        """Tells recordings of a plan that the layer inside does not tell them of itself."""
        for recording in self.layer.recordings:
            recording.add(self.layer, result.plan)

    def _refuse_weights(self, need_weights: bool) -> None:
        if need_weights:
            raise UnsupportedError(
                f"need_weights: expected False, got True: {self.variant!r} computes no matrix of weights, only plain "
                "attention does"
            )
        if self.training and self.dropout:
            raise UnsupportedError(
                f"dropout: expected 0 in training, got {self.dropout}: {self.variant!r} drops no attention weights; "
                "set this module's dropout to 0"
            )

    def _attend_variant(self, call: TorchCall) -> Tensor:
        hidden = masks.hidden_keys(call.key_padding, self.variant)
        causal = call.causal or masks.is_causal(call.attn_mask, self.variant)
        if not call.is_self:
            self._refuse_context(call, causal)
            result = self.layer.attend(call.query, None, hidden, None, call.key)
            return result.out
        layer = self._layer(causal)
        if not call.one_source:
            return self._attend_other_values(layer, call, hidden)
        result = layer.attend(call.query, None, hidden)
        if layer is not self.layer:
            self._note(layer, result)
        return result.out

    def _refuse_context(self, call: TorchCall, causal: bool) -> None:
        why = inside.why_no_context(self.layer)
        if why is None and causal:
            why = "positions in two sequences cannot be compared, so that no mask is causal"
        if why is None and not call.one_source:
            why = f"keys and values must be of the same tokens for {self.variant!r}"
        if why is not None:
            raise UnsupportedError(f"key: expected the query's own tokens (query is key), got others: {why}")

    def _attend_other_values(self, layer: AttentionLayer, call: TorchCall, hidden: Tensor | None) -> Tensor:
        """Self attention whose values come from other tokens at the same places, such as some without positions."""
        if not layer.runs_own("project", AttentionLayer):
            raise UnsupportedError(
                f"value: expected the keys' own tokens (key is value), got others: {self.variant!r} does more than "
                "project them"
            )
        step = layer.begin(call.query, None, hidden, None, None)
        heads = layer.project(step)
        value = call.value
        if step.padding is not None:
            # Real tokens are moved to the left, as the queries have been.
            order = masks.real_first(step.padding)
            value = take_rows(value.masked_fill(step.padding.unsqueeze(-1), 0), order)
        heads = replace(heads, v=self.project(call.query, call.key, value)[2])
        inputs = layer.remember(step, heads)
        plan = layer.plan_call(step, heads, inputs)
        result = AttentionOutput(layer.combine(step, layer.operate(inputs, plan), plan), plan)
        self._note(layer, result)
        return result.out

    def _attend_nested(
        self, nested: Tensor, need_weights: bool, average: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A nested tensor padded, attended to, and nested again."""
        lengths = [len(item) for item in nested.unbind()]
        x = nested.to_padded_tensor(0.0)
        token = torch.arange(x.shape[1], device=x.device)
        padding = token >= torch.tensor(lengths, device=x.device).unsqueeze(1)
        out, weights = self(x, x, x, padding, need_weights, None, average, is_causal)
        items = [out[i, :length] for i, length in enumerate(lengths)]
        return torch.nested.as_nested_tensor(items, layout=torch.strided), weights


def _bias(padding: Tensor | None, q: Tensor) -> Tensor | None:
    return None if padding is None else masks.key_bias(padding, q.dtype)

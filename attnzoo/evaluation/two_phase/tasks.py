"""What a policy is asked behind a context: the text going on, a span of it word for word, and a number it was told.

None of it needs data: any text will do, and a passkey's haystack is made here.

Letters: C tokens of a context, T tokens of a continuation, n tokens scored of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.errors import ConfigError

Encode = Callable[[str], Tensor]
"""From text to tokens, int64 ``[any]``, without special ones."""

TEXT = "text"
RECALL = "recall"
KEY = "key"
KINDS = (TEXT, RECALL, KEY)

BREAK = "\n\n"
"""What parts a context from a span that is repeated."""

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about"
    " the important information there.\n"
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5

CONTINUATION = 128
"""Tokens of a text that are read behind a context."""

KEY_CONTEXT = 640


@dataclass(frozen=True, eq=False)
class Probe:
    """A continuation, and which of its tokens are scored.

    Attributes:
        kind: One of ``KINDS``.
        ids: int64 ``[T]``.
        scored: Places in ``ids``, int64 ``[n]``, ascending from 1: a token is scored by what the one before it says.
    """

    kind: str
    ids: Tensor
    scored: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """A context, and what is asked behind it; each probe begins anew behind the context.

    Attributes:
        name: Which it is.
        context: int64 ``[C]``.
        probes: What is asked.
    """

    name: str
    context: Tensor
    probes: tuple[Probe, ...]


def text_probe(ids: Tensor) -> Probe:
    """The text that follows a context, int64 ``[T]``; all but its first token are scored."""
    return Probe(TEXT, ids, torch.arange(1, len(ids), device="cpu"))


def places(count: int, length: int) -> list[int]:
    """So many places in a context of ``length`` tokens, evenly apart, none in its first and its last part.

    What a window still holds needs no memory: the last two of ``count + 2`` parts have no place.
    """
    return [(i + 1) * length // (count + 2) for i in range(count)]


def recall_probe(context: Tensor, start: int, *, separator: Tensor, length: int = 64, cue: int = 8) -> Probe:
    """A span of a context once more, word for word.

    Args:
        context: int64 ``[C]``.
        start: Where the span begins.
        separator: Tokens before it, int64 ``[any]``.
        length: Tokens of the span.
        cue: Its first tokens, by which a model knows what is meant; they are not scored.

    Raises:
        ConfigError: If the context has no such span, or nothing of it would be scored.
    """
    if not 1 <= cue < length:
        raise ConfigError(f"cue: expected from 1 to {length - 1} of the {length} tokens of a span, got {cue}")
    if not 0 <= start <= len(context) - length:
        raise ConfigError(f"context: expected a span of {length} tokens from {start} on, got {len(context)} tokens")
    ids = torch.cat((separator, context[start : start + length]))
    scored = torch.arange(len(separator) + cue, len(ids), device="cpu")
    return Probe(RECALL, ids, scored)


def text_case(
    name: str,
    tokens: Tensor,
    *,
    context: int,
    encode: Encode,
    continuation: int = CONTINUATION,
    spans: int = 3,
    span: int = 64,
) -> Case:
    """A text going on, and spans of it that are repeated.

    Args:
        name: Of the text.
        tokens: Context and continuation, int64 ``[any]``; what lies behind them is not read.
        context: C.
        encode: Of the model's tokenizer.
        continuation: Tokens behind the context that are read; all but the first are scored.
        spans: How many spans are repeated, each behind the context alone.
        span: Tokens of each; the last seven eighths are scored.

    Raises:
        ConfigError: If the text is too short, or the context for its spans.
    """
    for argument, value, least in (("context", context, 2), ("continuation", continuation, 2), ("spans", spans, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{argument}: expected an int from {least}, got {value!r}")
    if len(tokens) < context + continuation:
        raise ConfigError(f"text: expected {context + continuation} tokens, got {len(tokens)}")
    held = tokens[:context]
    separator = encode(BREAK)
    repeated = [
        recall_probe(held, start, separator=separator, length=span, cue=span // 8) for start in places(spans, context)
    ]
    return Case(name, held, (text_probe(tokens[context : context + continuation]), *repeated))


def passkey_case(
    name: str, encode: Encode, *, context: int, key: str, depth: float, haystack: Tensor | None = None
) -> Case:
    """A number in a haystack, asked for behind it: a policy does not know what will be asked when it chooses.

    Source: Mohtashami and Jaggi 2023, *Landmark Attention* (arXiv:2305.16300), section 4.2; Peng et al. 2023, *YaRN*.
    Departures: the question is no part of the context; five digits; a haystack of other tokens where one is given.

    Args:
        name: Of the case.
        encode: Of the model's tokenizer.
        context: C, exactly.
        key: The number.
        depth: Share of the haystack before it.
        haystack: Tokens to hide it in, int64 ``[any]``; ``None`` says the same five sentences again and again.

    Raises:
        ConfigError: If the context has no room for what must be said, or the haystack is too short.
    """
    head = encode(INTRODUCTION)
    needle = encode(NEEDLE.format(key=key))
    room = context - len(head) - len(needle)
    if room < 2:
        raise ConfigError(f"context: expected at least {context - room + 2} tokens for a passkey, got {context}")
    if haystack is None:
        grass = encode(GRASS)
        haystack = grass.repeat(-(-room // max(1, len(grass))))
    if len(haystack) < room:
        raise ConfigError(f"haystack: expected {room} tokens, got {len(haystack)}")
    before = int(room * depth)
    told = torch.cat((head, haystack[:before], needle, haystack[before:room]))
    question = encode(QUESTION)
    answer = encode(f" {key}")
    # Where a blank is a token of its own it says nothing of the key, and is not scored.
    other = encode(f" {''.join(str((int(digit) + 5) % 10) for digit in key)}")
    shared = _shared(answer, other)
    scored = torch.arange(len(question) + shared, len(question) + len(answer), device="cpu")
    return Case(name, told, (Probe(KEY, torch.cat((question, answer)), scored),))


def standard_cases(
    name: str, tokens: Tensor, *, encode: Encode, context: int, windows: int = 1, passkeys: int = 3
) -> list[Case]:
    """Contexts of a text, and passkeys.

    Args:
        name: Of the text.
        tokens: int64 ``[any]``; contexts begin one behind the other, each with its continuation.
        encode: Of the model's tokenizer.
        context: C.
        windows: How many contexts.
        passkeys: How many of them, in contexts of at most ``KEY_CONTEXT`` tokens: small models find them in no longer
            ones.

    Raises:
        ConfigError: If the text is too short, or a context.
    """
    found = []
    for number in range(windows):
        title = name if windows == 1 else f"{name}, window {number + 1}"
        rest = tokens[number * (context + CONTINUATION) :]
        found.append(text_case(title, rest, context=context, encode=encode))
    for number, key in enumerate(keys(passkeys)):
        depth = (number + 1) / (passkeys + 2)
        title = f"key {number + 1}"
        found.append(passkey_case(title, encode, context=min(context, KEY_CONTEXT), key=key, depth=depth))
    return found


def keys(count: int, seed: int = 0) -> list[str]:
    """Numbers of five digits, the same for the same seed."""
    least = 10 ** (DIGITS - 1)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(least, 10 * least, (count,), generator=generator, device="cpu")
    return [str(key) for key in found.tolist()]


def _shared(answer: Tensor, other: Tensor) -> int:
    """How many tokens begin both; none where one is the beginning of the other."""
    shortest = min(len(answer), len(other))
    apart = (answer[:shortest] != other[:shortest]).nonzero()
    return int(apart[0]) if len(apart) else 0

"""Words in their order, by classes, as tokens: what heads that score successors are asked for.

Source: Gould et al. 2023, *Successor Heads*, section 2 (arXiv:2312.09230), whose tasks are of such classes. A word must
be one token, with a space before it or, if some of its class are not, without.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnzoo.evaluation.two_phase.tasks import Encode
from attnzoo_kernels.errors import ConfigError

WORDS: Mapping[str, tuple[str, ...]] = {
    "digits": tuple("0123456789"),
    "numbers": tuple("one two three four five six seven eight nine ten eleven twelve".split()),
    "ordinals": tuple("first second third fourth fifth sixth seventh eighth ninth tenth".split()),
    "weekdays": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "months": tuple("January February March April May June July August September October November December".split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
"""By class, in order."""


def word_classes(encode: Encode) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The classes whose words are single tokens.

    Args:
        encode: From text to tokens, int64 ``[any]``, without special ones.

    Returns:
        Tokens by class, in order; and by class that is skipped the word that is no single token.

    Raises:
        ConfigError: If no class is left.
    """
    found: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for name, words in WORDS.items():
        tokens = [[encode(f"{space}{word}").tolist() for word in words] for space in (" ", "")]
        single = next((row for row in tokens if all(len(one) == 1 for one in row)), None)
        if single is None:
            skipped[name] = next(word for word, one in zip(words, tokens[0], strict=True) if len(one) != 1)
        else:
            found[name] = [one[0] for one in single]
    if not found:
        raise ConfigError(f"tokenizer: expected one that has words as single tokens, got none of {', '.join(WORDS)}")
    return found, skipped

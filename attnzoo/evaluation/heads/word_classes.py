"""Words in their order, by classes, as tokens: what heads that score successors are asked for.

Source: Gould et al. 2023, *Successor Heads*, section 2 (arXiv:2312.09230), whose tasks are of such classes. A word must
be one token, with a space before it or, if some of its class are not, without.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnzoo.evaluation.two_phase.tasks import Encode
from attnzoo_kernels.errors import ConfigError

WORDS: Mapping[str, str] = {
    "digits": "0 1 2 3 4 5 6 7 8 9",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
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
    for name, text in WORDS.items():
        words = text.split()
        tokens = [[encode(f"{space}{word}").tolist() for word in words] for space in (" ", "")]
        single = next((row for row in tokens if all(len(one) == 1 for one in row)), None)
        if single is None:
            skipped[name] = next(word for word, one in zip(words, tokens[0], strict=True) if len(one) != 1)
        else:
            found[name] = [one[0] for one in single]
    if not found:
        raise ConfigError(f"tokenizer: expected one that has words as single tokens, got none of {', '.join(WORDS)}")
    return found, skipped

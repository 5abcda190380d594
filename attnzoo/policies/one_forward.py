"""What a single forward over a text can say about a KV-cache policy, and what it cannot."""

from __future__ import annotations

from typing import Any

from attnzoo import surgery
from attnzoo.cache.policies.protocol import Policy
from attnzoo.surgery.hosts.attention_function import pattern_of

UNSEEN = "ONE FORWARD SAYS NOTHING: the policy acts behind a prompt, compare --policy"
"""Flag of a row whose policy does nothing in the forward that was scored."""


def why_one_forward_says_nothing(policy: Policy | None) -> str | None:
    """Why a single forward over a text does not show what a policy costs; ``None`` where it does.

    Args:
        policy: ``None`` is the model as it is.
    """
    if policy is None:
        return None
    if policy.compacts:
        return f"{policy.name} chooses behind a prompt what it keeps; while one forward reads, everything is still held"
    if policy.reads_pages:
        return f"{policy.name} chooses pages for decoding rows; one forward over a text reads all of them"
    return None


def policy_on(model: Any) -> Policy | None:
    """The policy of the first block that follows one, after a conversion to it; ``None`` where none does."""
    for site in surgery.find(model):
        pattern = pattern_of(model.get_submodule(site.path))
        policy = getattr(getattr(pattern, "layer", None), "policy", None)
        if isinstance(policy, Policy):
            return policy
    return None

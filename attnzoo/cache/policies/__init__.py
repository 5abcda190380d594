"""What the KV heads of a layer remember: policies, which hold no tensor of any sequence. One file for each method."""

from __future__ import annotations

from attnzoo.cache.policies.duo import Duo as Duo
from attnzoo.cache.policies.protocol import Policy as Policy
from attnzoo.cache.policies.protocol import policies as policies
from attnzoo.cache.policies.protocol import policy_from as policy_from
from attnzoo.cache.policies.streaming import Streaming as Streaming

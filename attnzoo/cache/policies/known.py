"""Every policy, so that it is found by its name."""

from __future__ import annotations

from attnzoo.cache.policies.compose import Compose as Compose
from attnzoo.cache.policies.duo import Duo as Duo
from attnzoo.cache.policies.ems import EMS as EMS
from attnzoo.cache.policies.locret import Locret as Locret
from attnzoo.cache.policies.locret import RetainingHead as RetainingHead
from attnzoo.cache.policies.protocol import Policy as Policy
from attnzoo.cache.policies.protocol import policies as policies
from attnzoo.cache.policies.protocol import policy_from as policy_from
from attnzoo.cache.policies.razor import Razor as Razor
from attnzoo.cache.policies.reading import Pages as Pages
from attnzoo.cache.policies.scored import H2O as H2O
from attnzoo.cache.policies.scored import TOVA as TOVA
from attnzoo.cache.policies.scored import KNorm as KNorm
from attnzoo.cache.policies.scored import SnapKV as SnapKV
from attnzoo.cache.policies.streaming import Streaming as Streaming

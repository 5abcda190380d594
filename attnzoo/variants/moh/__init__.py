"""Mixture-of-head attention: the layer, its routers, and leaving out rows that no head computes."""

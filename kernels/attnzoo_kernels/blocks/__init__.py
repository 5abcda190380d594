"""Arithmetic of blocks that paths of the CPU share: gates, and rotation by origins."""

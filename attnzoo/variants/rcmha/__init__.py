"""RCMHA: the layer, its convolutions, and relative positions."""

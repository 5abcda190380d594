"""LongHeads: the layer, and choosing and placing chunks."""

"""S2 attention: the layer, and a cache that frees what no head will read again."""

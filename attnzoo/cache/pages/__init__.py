"""A cache of pages: rows of each KV head that a policy keeps, in one pool for all heads of a layer."""

"""Converting a checkpoint block by block: one layer is in memory at a time, and no model ever is."""

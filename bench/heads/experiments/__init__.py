"""The experiments, a file each: from a setting to an outcome."""

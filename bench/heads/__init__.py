"""What papers on single heads found, once more on SmolLM2: ``python -m bench.heads``."""

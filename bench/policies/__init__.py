"""What KV-cache policies cost and keep on SmolLM2: ``python -m bench.policies``."""

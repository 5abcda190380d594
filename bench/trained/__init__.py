"""Small models trained on the text that ships, and converted: ``python -m bench.trained``."""

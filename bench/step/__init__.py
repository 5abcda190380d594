"""What a decoding step of a converted model costs beside the model that it was made from: ``python -m bench.step``."""

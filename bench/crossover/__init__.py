"""From which length a layer is quicker than ten lines of torch: ``python -m bench.crossover``."""

"""Heads that read otherwise than their layer has it: biases of keys by token, plain means, sinks that count less."""

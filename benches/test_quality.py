"""Perplexity, KL divergence and top-1 agreement against this run's own bf16: once per format, whatever the mode."""


def test_quality(format, measure_case):
    measure_case()

"""Prefill: one forward pass over the prompt up to the first token (TTFT), compiled as its mode says."""


def test_prefill(format, mode, workload, measure_case):
    measure_case()

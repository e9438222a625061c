"""Decode: dependent greedy steps over a static KV cache, token feedback inside the timed region (TPOT, tok/s)."""


def test_decode(format, mode, workload, measure_case):
    measure_case()

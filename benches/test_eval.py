"""Tasks of lm-evaluation-harness on the quantized model in place (--eval TASKS): once per format and task."""


def test_eval(format, workload, measure_case):
    measure_case()

"""Single products of a linear at batch 1, 2, 4 and 8: µs, GB/s and the share of the read bandwidth. Not in any suite:

pytest benches/test_kernels.py -k "lowbit and down_proj"

``a16w4_g128-lowbit-native`` is the kernel of mode native, ``a16w4_g128-lowbit`` that of other GPUs.
"""

import pytest

pytestmark = pytest.mark.kernels


def test_kernels(contender, product, measure_product):
    measure_product()

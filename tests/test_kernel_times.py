from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowbit.kernel_times import LINEAR, Kernel, longest, triton_bytes


class Events:
    """A profile's events, as torch.profiler gives them."""

    def __init__(self):
        self.all = []

    def add(self, name, us=0.0, *, on="CPU", parent=None, annotation=False, kernels=()):
        event = SimpleNamespace(
            name=name,
            id=len(self.all),
            device_type=SimpleNamespace(name=on),
            is_user_annotation=annotation,
            self_cpu_time_total=us,
            time_range=SimpleNamespace(elapsed_us=lambda: us),
            cpu_parent=parent,
            kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        )
        self.all.append(event)
        return event


def by_name(kernels: list[Kernel]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}


def test_a_cards_kernels_are_summed_and_brackets_left_out():
    events = Events()
    for us in (3.0, 5.0):
        events.add("gemv", us, on="CUDA")
    events.add("Memcpy DtoD", 1.0, on="CUDA")
    events.add(f"{LINEAR}100", 99.0, on="CUDA", annotation=True)
    events.add("aten::mm", 50.0)
    first, second = longest(events.all, "cuda", {})
    assert (first.name, first.us, first.calls, first.gb_s) == ("gemv", 8.0, 2, None)
    assert second.name == "Memcpy DtoD"


def test_a_linears_bytes_go_to_its_longest_kernel_over_the_time_of_all_of_its():
    events = Events()
    for size, main_us in ((1_000_000, 90.0), (3_000_000, 290.0)):
        mark = events.add(f"{LINEAR}{size}", annotation=True)
        outer = events.add("aten::linear", parent=mark)
        events.add("aten::mm", parent=outer, kernels=[("dequantize", 10.0), ("gemv", main_us)])
        events.add("dequantize", 10.0, on="CUDA")
        events.add("gemv", main_us, on="CUDA")
    events.add("aten::add", kernels=[("gemv", 500.0)])  # of no linear
    events.add("gemv", 500.0, on="CUDA")
    found = by_name(longest(events.all, "cuda", {}))
    assert found["gemv"].us == 880.0
    assert found["gemv"].gb_s == pytest.approx(4e6 / 400e-6 / 1e9)
    assert found["dequantize"].gb_s is None


def test_one_slow_view_takes_no_linears_bytes():
    events = Events()
    for view_us in (1.0, 1.0, 50.0):
        mark = events.add(f"{LINEAR}1000000", annotation=True)
        events.add("aten::view", view_us, parent=mark)
        events.add("aten::mm", 40.0, parent=mark)
    found = by_name(longest(events.all, "cpu", {}))
    assert found["aten::view"].gb_s is None
    assert found["aten::mm"].gb_s == pytest.approx(3e6 / 172e-6 / 1e9)


def test_on_a_cpu_operators_and_inductors_kernels_count_and_nothing_else():
    events = Events()
    for name in ("aten::mm", "torchao::quantize", "graph_0_cpp_fused_add_1", "cpp_fused_mul_0"):
        events.add(name, 1.0)
    for name in ("Torch-Compiled Region: 0/0", "## Call CompiledFxGraph x ##", "TorchDynamo Cache Lookup"):
        events.add(name, 100.0)
    events.add(f"{LINEAR}100", 100.0, annotation=True)
    names = {kernel.name for kernel in longest(events.all, "cpu", {})}
    assert names == {"aten::mm", "torchao::quantize", "graph_0_cpp_fused_add_1", "cpp_fused_mul_0"}


def test_a_triton_kernels_bytes_are_inductors(tmp_path):
    def code(name, gb):
        meta = f"inductor_meta={{'kernel_name': '{name}', 'kernel_num_gb': {gb}}}," if gb else "inductor_meta={},"
        return f"{name} = async_compile.triton('{name}', '''\n{meta}\ndef {name}(): pass\n''', device_str='cuda')\n"

    for folder, text in {
        "model__0": code("triton_red_0", 0.002) + code("triton_poi_1", 1e-06) + code("triton_bare_2", None),
        "model__1": code("triton_poi_1", 5e-06),
    }.items():
        (tmp_path / "torchinductor" / folder).mkdir(parents=True)
        (tmp_path / "torchinductor" / folder / "output_code.py").write_text(text)
    sizes = triton_bytes(tmp_path)
    assert sizes == {"triton_red_0": 2_000_000.0}  # triton_poi_1 has two figures, triton_bare_2 none
    events = Events()
    for _ in range(2):
        events.add("triton_red_0", 1.0, on="CUDA")
    (kernel,) = longest(events.all, "cuda", sizes)
    assert kernel.gb_s == pytest.approx(2000.0)  # 2 MB in 1 µs


def test_no_compiles_no_bytes(tmp_path):
    assert triton_bytes(tmp_path / "absent") == {}

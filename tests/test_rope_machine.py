"""What the rotary kernel compiles to, without a GPU, and which path is chosen where."""

import os
import re
import subprocess
import sys

import pytest
import torch._dynamo.testing

import rope_kernels
from tests.conftest import DEVICE, NO_TRITON


def compiled_launch(monkeypatch, capability, shape, dtype):
    """What Triton's own launcher compiles for views of a fused qkv of this shape; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = get_current_stream = lambda self, device=None: 0
        get_current_target = lambda self: GPUTarget("cuda", capability, 32)  # noqa: E731

    class CompileOnly(JITFunction):
        def __getitem__(self, grid):
            return lambda *a, **options: compiled.append(self.warmup(*a, grid=grid, **options))

    compiled = []
    for name in ("_rope_kernel", "_cos_kernel", "_rotate_kernel"):
        jit = CompileOnly if name == "_rope_kernel" else JITFunction
        monkeypatch.setattr(rope_kernels, name, jit(getattr(rope_kernels, name).fn))
    monkeypatch.setattr(rope_kernels, "INTERPRETED", False)
    monkeypatch.setattr(rope_kernels.triton.runtime.driver, "_active", Driver())
    batch, n_tokens, n_heads, n_kv_heads, head_dim = shape
    heads = n_heads, n_kv_heads, n_kv_heads
    qkv = torch.empty(batch, n_tokens, sum(heads), head_dim, dtype=dtype, device="meta")
    ids = torch.empty(batch, n_tokens, dtype=torch.int64, device="meta")
    inv_freq = torch.empty(head_dim // 2, dtype=torch.float64, device="meta")
    rope_kernels._launch(*qkv.split(heads, dim=2)[:2], ids, inv_freq, 1.0, 1.0)
    return compiled[0]


@NO_TRITON
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 32768, 32, 8, 128), torch.bfloat16),  # Llama-3-8B
        ((1, 32768, 32, 8, 128), torch.float32),
        ((2, 512, 9, 3, 64), torch.bfloat16),  # SmolLM2-135M: heads no power of two
        ((1, 4096, 32, 32, 80), torch.float16),
    ],
    ids=str,
)
def test_machine_code_loads_16_bytes_and_uses_no_local_memory(
    monkeypatch, capability, shape, dtype
):
    kernel = compiled_launch(monkeypatch, capability, shape, dtype)
    ptx = kernel.asm["ptx"]
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(store.endswith(".v4.b32") for store in stores)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == len(stores)  # q and k; ids are apart
    assert ".local" not in ptx and "fma.rn.f32" not in ptx and not kernel.metadata.enable_fp_fusion
    assert "0d3FC45F306DC9C883" in ptx  # 1 / 2 pi to all the bits of float64


def test_without_triton_the_module_imports_and_rotates_in_torch():
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import torch, rope_kernels
q, ids = torch.randn(1, 3, 2, 8, requires_grad=True), torch.arange(3)
inv_freq, _ = rope_kernels.rope_frequencies(8, 1e4)
rotated, _ = rope_kernels.apply_rope(q, q, ids, inv_freq)
rotated.sum().backward()
assert torch.equal(rotated, rope_kernels.apply_rope_torch(q, q, ids, inv_freq)[0])
print(rope_kernels.rope_backend("cpu"), "|", rope_kernels.rope_backend("cuda"))
"""
    folder = os.path.dirname(rope_kernels.__file__)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.stdout.strip() == " | ".join(2 * ["torch (triton is not installed)"]), (
        result.stderr
    )


@NO_TRITON
def test_the_chosen_path_is_told(monkeypatch):
    kernel = "triton (interpreted)" if rope_kernels.INTERPRETED else "triton"
    assert rope_kernels.rope_backend("cpu") == "torch (no GPU)"
    assert rope_kernels.rope_backend("cuda:1") == kernel
    monkeypatch.setattr(rope_kernels, "interpret_on_cpu", rope_kernels.INTERPRETED)
    assert rope_kernels.rope_backend(DEVICE) == kernel

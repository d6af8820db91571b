"""What the rotary kernel compiles to, without a GPU, and which path is chosen where.

Under another Triton, as it comes with torch 2.11:
    pip install --target t36 --no-deps triton==3.6.0
    PYTHONPATH=t36 python -m pytest -q tests/test_rope_machine.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

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
    for name in [name for name in vars(rope_kernels) if name.endswith("_kernel")]:
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


def machine_code(kernel, folder):
    """Registers of a thread, bytes of its stack (spills) and the names of the instructions: what
    Triton's ptxas wrote into the cubin, read by the cuobjdump next to it."""
    tool = Path(rope_kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "rope.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def dump(what):
        return subprocess.run(
            [tool, what, cubin], capture_output=True, text=True, check=True
        ).stdout

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
    line = r"^\s*/\*[0-9a-f]{4}\*/\s+(?:@!?\w+ )?([A-Z][\w.]+)"
    names = [name for name in re.findall(line, dump("-sass"), re.MULTILINE) if name != "NOP"]
    return int(registers), int(stack), names


@NO_TRITON
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "shape, dtype, most",
    [
        ((1, 32768, 32, 8, 128), torch.bfloat16, 670),  # Llama-3-8B
        ((1, 32768, 32, 8, 128), torch.float32, 620),
        ((2, 512, 9, 3, 64), torch.bfloat16, 770),  # SmolLM2-135M: heads no power of two
        ((1, 4096, 32, 32, 80), torch.float16, 920),
        ((1, 4096, 64, 8, 128), torch.bfloat16, 1070),  # Llama-3-70B
    ],
    ids=str,
)
def test_machine_code_has_all_its_loads_under_way_first_and_makes_each_angle_once(
    monkeypatch, tmp_path, capability, shape, dtype, most
):
    """most: instructions of a program, whose issue must take less than its memory traffic."""
    kernel = compiled_launch(monkeypatch, capability, shape, dtype)
    ptx, n_warps = kernel.asm["ptx"], kernel.metadata.num_warps
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(store.endswith(".v4.b32") for store in stores)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == len(stores)  # q, k, not ids
    assert ".local" not in ptx and "fma.rn.f32" not in ptx and not kernel.metadata.enable_fp_fusion
    assert "0d3FC45F306DC9C883" in ptx  # 1 / 2 pi to all the bits of float64

    registers, stack, names = machine_code(kernel, tmp_path)
    spills = [name for name in names if name.startswith(("LDL", "STL"))]
    assert stack == 0 and not spills and 0 < len(names) <= most
    first_angle = names.index("DMUL")
    loads = [i for i, name in enumerate(names) if name.startswith("LDG.E.128")]
    assert len(loads) >= len(stores) and max(loads) < first_angle
    # A thread makes one angle, where a program has as many threads as planes: two products each.
    _, _, n_heads, n_kv_heads, head_dim = shape
    planes = rope_kernels.triton.next_power_of_2(head_dim // 2)
    tokens = max(1, 1024 // planes // rope_kernels.triton.next_power_of_2(n_heads))
    assert names.count("DMUL") == 2 * tokens * planes // (32 * n_warps)
    # 4.8 TB/s at a latency of 1 us need 36 KB on their way to each of an H200's 132 processors.
    programs = min(32, 2**16 // (-(-registers // 8) * 8 * 32 * n_warps))
    read = tokens * (n_heads + n_kv_heads) * head_dim * dtype.itemsize
    assert programs * read >= 48_000


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

"""The GPU's path on the device that is there: the same tests on a GPU and, mapped, on a CPU.

python -m pytest tests/test_gpu.py    on a rented machine; measure.bench prove runs it as a stage.
"""

import ast
import importlib
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from longred import main
from machine import memory, plan
from machine.formats import load_checkpoint
from machine.plan import Policy
from machine.run import train
from measure import bench, evaluate, timing
from model import causal_attention, fp32_product
from rope_kernels import rope_backend
from tests.conftest import DEVICE, HERE, NO_TRITON, read_log, same_run, tiny_llama, tiny_run

ON_GPU = DEVICE == "cuda"
BF16 = dict(rtol=2e-2, atol=2e-2)  # two or three roundings to 2^-8


def random(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def adamw(host, chunk=1000):
    weights = [torch.nn.Parameter(random(37, 101, seed=1)), torch.nn.Parameter(random(999, seed=2))]
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    return weights, memory.AdamW(weights, **settings, host=host, chunk=chunk)


def test_adamw_streamed_from_host_memory_has_the_bits_of_one_that_stays():
    (one, stays), (two, streams) = adamw(host=False), adamw(host=True)
    for step in range(5):
        for a, b in zip(one, two, strict=True):
            a.grad.copy_(random(*a.shape, seed=10 + step, dtype=torch.float32))
            b.grad.copy_(a.grad)
        stays.step()
        streams.step()
    torch.get_device_module(DEVICE).synchronize()
    assert all(map(torch.equal, one, two))
    states = zip(stays.state, streams.state, strict=True)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in states)
    memory.free_host_buffers()


def test_offloaded_and_recomputed_blocks_give_the_gradients_of_blocks_kept_whole():
    llama = tiny_llama(n_layers=5).to(DEVICE, torch.bfloat16).train()
    ids = torch.arange(2 * 128, device=DEVICE).view(2, 128) % 96

    def gradients():
        llama.zero_grad()
        hidden, _ = llama(ids)
        (hidden.float() * hidden.float().roll(1, -1)).mean().backward()
        return {name: p.grad.float() for name, p in llama.named_parameters() if p.grad is not None}

    expected = gradients()
    offload = memory.Offload(5, 2 * 128 * 48 * 2, torch.device(DEVICE))
    for policy in (Policy(), Policy(attention=2), Policy(1, 2, offload=True, mlp_rows=100)):
        memory.apply_policy(llama, policy, offload)
        for name, grad in gradients().items():
            assert (grad - expected[name]).norm() <= 0.03 * expected[name].norm(), (policy, name)
    memory.free_host_buffers()


def test_a_teacher_visits_with_the_weights_it_left_with():
    teacher = tiny_llama().to(DEVICE, torch.bfloat16).requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    visitor = memory.Visitor(teacher, torch.device(DEVICE))
    assert all(p.device.type == "cpu" for p in teacher.parameters())
    for _ in range(2):
        visitor.come(lm_head=True)
        assert all(map(torch.equal, teacher.parameters(), before))
        assert all(p.device.type == DEVICE for p in teacher.parameters())
        visitor.leave()
    memory.free_host_buffers()


def test_products_of_bf16_come_out_in_fp32():
    a, b = random(64, 4096), random(4096, 48, seed=1)
    product = fp32_product(a, b)
    assert product.dtype == torch.float32
    exact = a.double() @ b.double()
    limit = 1e-5 if ON_GPU else 2**-8  # a CPU rounds to bf16 first
    assert (product - exact).norm() < limit * exact.norm()


def test_products_add_up_in_fp32_inside_the_matmul_where_torch_can(monkeypatch):
    """Small whole numbers, of which every product and sum is exact in bf16 and in fp32."""
    assert model.matmul_adds(torch.device(DEVICE)) == ON_GPU  # torch 2.10 or later
    pairs = [(random(48, 24, seed=s).sign(), random(48, 40, seed=s + 9).sign()) for s in range(3)]
    exact = sum(a.double().T @ b.double() for a, b in pairs)
    addmm, inside = torch.addmm, []

    def spy(total, a, b, *, out_dtype, out):
        inside.append((a.dtype, out_dtype, out is total))
        if ON_GPU:
            return addmm(total, a, b, out_dtype=out_dtype, out=out)
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", spy)
    for can in (False, True):
        monkeypatch.setattr(model, "matmul_adds", lambda device, can=can: can)
        sums, weight = [None], torch.zeros(24, 40, device=DEVICE)
        for a, b in pairs:
            memory._add_to_sum(sums, 0, a, b)
            model.add_product(weight, a.T, b)
        for total in (sums[0], weight):
            assert total.dtype == torch.float32 and torch.equal(total.double(), exact)
        assert inside == [(torch.bfloat16, torch.float32, True)] * 5 * can


@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "chosen"])
@pytest.mark.parametrize("start", [0, 128])
def test_attention_and_its_gradients_are_those_of_the_formula(backend, start):
    """GQA 4:2, heads of 64; start: queries after so many cached keys, lower-right causal."""
    if backend == "CUDNN_ATTENTION" and (start or not ON_GPU):
        pytest.skip("cuDNN answers on a GPU, without a cache")
    q, k, v = random(2, 128, 4, 64), *(random(2, 128 + start, 2, 64, seed=i) for i in (1, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if backend == "chosen" or start:
        out = causal_attention(*leaves, start)
    else:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            args = (x.transpose(1, 2) for x in leaves)
            out = F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wide = [x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in exact]
    scores = wide[0] @ wide[1].transpose(-1, -2) / 8
    future = torch.ones(128, 128 + start, dtype=torch.bool, device=DEVICE).triu(start + 1)
    formula = (scores.masked_fill(future, -torch.inf).softmax(-1) @ wide[2]).transpose(1, 2)
    torch.testing.assert_close(out.double(), formula, **BF16)
    wanted = torch.autograd.grad(formula.square().sum(), exact)
    for got, want in zip(grads, wanted, strict=True):
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_decoding_asks_flash_alone_and_training_may_have_cudnn():
    asked, real = [], model.sdpa_kernel
    spy = lambda backends: asked.append(backends) or real(backends)  # noqa: E731
    answer = mock.patch.object(F, "scaled_dot_product_attention", lambda q, *_, **__: q)
    with FakeTensorMode(), mock.patch.object(model, "sdpa_kernel", spy), answer:
        q, k = (torch.empty(1, t, 2, 64, dtype=torch.bfloat16, device="cuda") for t in (1, 9))
        causal_attention(q, k, k, start=8)
        causal_attention(k, k, k)
    assert asked[0] == [SDPBackend.FLASH_ATTENTION]
    assert asked[1] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def test_generation_with_a_cache_is_that_without():
    llama = tiny_llama().to(DEVICE)
    ids = torch.arange(20, device=DEVICE)[None] % 96
    out = llama.generate(ids, 12, chunk_len=7)
    for end in range(20, 32):
        logits = llama.logits(llama(out[:, :end])[0][:, -1])
        assert logits.argmax(-1).item() == out[0, end].item()


def test_the_trial_passes_here_and_names_what_is_missing():
    plan.trial(DEVICE)
    for error, words in (
        (RuntimeError("Failed to find C compiler. Please specify"), "gcc"),
        (RuntimeError("fatal error: Python.h: No such file"), "python3-dev"),
        (RuntimeError("The NVIDIA driver on your system is too old (found 11040)"), "driver"),
        (RuntimeError("CUDA error: no kernel image is available"), "not built for this GPU"),
    ):
        with mock.patch.object(plan, "next_token_loss", side_effect=error):
            with pytest.raises(ValueError, match=words) as said:
                plan.trial(DEVICE)
        assert "\n" not in str(said.value)
    old = mock.patch.multiple(
        torch.cuda, get_device_capability=lambda _: (7, 5), get_device_name=lambda _: "Tesla T4"
    )
    with old, pytest.raises(ValueError, match="Tesla T4 has compute capability 7.5; need 8.0"):
        plan.trial("cuda")
    error = RuntimeError("The NVIDIA driver on your system is too old (found 11040)")
    silent = mock.patch.object(torch.cuda, "get_device_capability", side_effect=error)
    with silent, pytest.raises(ValueError, match="does not answer: the NVIDIA driver is too old"):
        plan.trial("cuda")


@NO_TRITON
@pytest.mark.parametrize(
    "missing, words", [("gcc", "install gcc or set CC"), ("Python.h", "python3-dev")]
)
def test_what_tritons_own_compilation_lacks_is_told_in_one_line(
    missing, words, monkeypatch, tmp_path
):
    """Triton's launcher, compiled as before a first kernel, on a machine without one thing."""
    from triton.runtime import build

    source = tmp_path / "launcher.c"
    source.write_text("#include <Python.h>\n")
    if missing == "gcc":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    elif shutil.which("gcc") is None:
        pytest.skip("no gcc, so nothing looks for Python's headers")
    else:
        nowhere = lambda *_, **__: {"include": str(tmp_path)}  # noqa: E731
        monkeypatch.setattr(build.sysconfig, "get_paths", nowhere)

    def first_kernel(*_, **__):
        build._build("launcher", str(source), str(tmp_path), [], [], [], [])

    monkeypatch.setattr(plan, "next_token_loss", first_kernel)
    with pytest.raises(ValueError, match=words) as said:
        plan.trial(DEVICE)
    assert "\n" not in str(said.value) and str(said.value).startswith("a trial of one tiny block")


def test_the_gpu_runs_the_kernel_it_is_told_to():
    assert rope_backend(DEVICE) == ("triton" if ON_GPU else "torch (no GPU)")


def test_an_out_of_memory_error_is_a_row_and_the_rows_before_it_are_on_disk(tmp_path, monkeypatch):
    def rope_at(n_tokens, rounds, device):
        if n_tokens == 128:
            written = json.loads((tmp_path / "rope-cpu-smoke.json").read_text())
            assert [row["T"] for row in written["rows"]] == [64]  # before it was over
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return [{"T": n_tokens, "peer": "x", "direction": "both", "us": 1.0, "GB_per_s": 1.0}
                | {"percent_of_copy": 100.0, "max_error": 0.0}]  # fmt: skip

    monkeypatch.setattr(timing, "rope_at", rope_at)
    monkeypatch.setattr(timing, "rope_host", lambda device: {})
    args = ["rope", "--device", "cpu", "--out_dir", str(tmp_path), "--lengths", "64,128,256"]
    bench.main(args)
    rows = json.loads((tmp_path / "rope-cpu-smoke.json").read_text())["rows"]
    assert [row["T"] for row in rows] == [64, 128, 256]
    assert rows[1]["out of memory"] == "CUDA out of memory. Tried to allocate 9 GiB"


def test_a_pass_without_memory_is_a_row_of_step_and_its_sum_is_not_whole(tmp_path, monkeypatch):
    run, written = timing.Trainer.unit, []

    def unit(self, unit):
        if unit.name == "short":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        run(self, unit)

    def spy(result, out_dir, name, quiet=False):
        written.append((name, list(result["units"]), "step" in result))

    monkeypatch.setattr(timing.Trainer, "unit", unit)
    monkeypatch.setattr(timing, "write_result", spy)
    given = ["--device", "cpu", "--rounds", "1", "--no-peers", "--gpu_gib", "60"]
    bench.main(["step", *given, "--out_dir", str(tmp_path)])
    names = ["long", "short", "s2l"]
    rows = [("step-60gib", names[:i], False) for i in (1, 2, 3)]  # after each pass
    assert written[:3] == rows and written[-1] == ("step-60gib", names, True)


def test_inputs_of_rope_at_128k_leave_room_on_a_card_of_80_gib(monkeypatch):
    """Four peers that save nothing, as Liger and we do; each set of inputs is 2.7 GB."""

    def peers(n_tokens, device):
        return dict.fromkeys("abcd", lambda q, k: (q * 1.0, k * 1.0))

    monkeypatch.setattr(timing, "rope_peers", peers)
    monkeypatch.setattr(timing, "rope_errors", lambda rotate, one_set: (0.0, 0.0))
    monkeypatch.setattr(timing, "microseconds", lambda run, sets, device: 1.0)
    with FakeTensorMode(), timing.CountBytes([], set()) as count:
        timing.rope_at(131072, 1, torch.device("cpu"))
    assert 20e9 < count.peak < 60e9


def test_a_limit_on_the_gpus_memory_goes_to_a_device_by_number(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *a: asked.append(a))
    card = mock.Mock(total_memory=100 * plan.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    args = mock.Mock(gpu_gib=40, host_gib=10)
    for name in ("cuda", "cuda:1"):
        assert timing.rooms(args, torch.device(name)) == (40 * plan.GIB, 10 * plan.GIB)
    assert asked == [(0.4, 3), (0.4, 1)]


# What only tensors on a real GPU reach, wherever it is: file -> functions.
ONLY_ON_A_GPU = {
    "model.py": {"causal_attention", "choose_attention_kernels", "document_attention"}
    | {"fp32_product"}
    | {"next_token_loss", "next_token_kl"},  # more rows at a time
    "rope_kernels.py": {"_launch", "apply_rope", "rope_backend"},
    "machine/keeper.py": {"_write_in_thread"},  # a stream of its own
    "machine/memory.py": {
        "host_buffer",
        "_forget_cuda_error",
        "free_host_buffers",
        "empty_cache",
    }
    | {"__init__"},  # whether host memory is locked
}


def everything_at_once(monkeypatch, **changes):
    """Plans that would do with less use every mechanism there is."""
    made = plan.make_plan

    def make_plan(*args, **kwargs):
        found = made(*args, **kwargs)
        tokens = max(u.tokens for u in found.units.values())
        hard = Policy(1, 1, offload=True, mlp_rows=50)
        away = dict(host_state=True, host_gradients=True, teacher_resident=False)
        away |= dict(policies=dict.fromkeys(found.units, hard), slot_bytes=2 * 48 * tokens)
        return replace(found, **away)

    monkeypatch.setattr(plan, "make_plan", make_plan)


def test_a_run_trains_stops_resumes_reports_and_is_evaluated_on_the_gpu(
    ckpt, tmp_path, monkeypatch, capsys, a_gpu
):
    everything_at_once(monkeypatch)
    sizes = dict(original_len=128, target_len=256, train_len=256, device="cuda", steps=2)
    sizes |= dict(long_micro=1, s2l_batch=1, short_batch=2, save_every=1)
    train(tiny_run(ckpt, tmp_path / "whole", **sizes, eval_tokens=0))
    assert "gradients leave the GPU in every pass" in capsys.readouterr().out
    config = tiny_run(ckpt, tmp_path / "parts", **sizes)
    step_done = memory.AdamW.step

    def stop(self):
        step_done(self)
        if self.steps == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(memory.AdamW, "step", stop), pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    train(type(config)(resume=str(tmp_path / "parts")))
    lines = read_log(tmp_path / "parts")
    assert [x["step"] for x in lines] == [1, 2] and lines[-1]["reserved_gib"] > 0
    assert lines[-1]["alloc_retries"] is not None and lines[-1]["peak_gib"] > 0
    if not ON_GPU:  # as conftest's GPU says
        assert "peak 2.0 GiB of 3.0 reserved, 2 allocation retries" in capsys.readouterr().out
    assert ON_GPU or same_run(tmp_path / "whole", tmp_path / "parts")  # on a CPU to the bit
    assert "beyond the window" in (tmp_path / "parts/report.md").read_text()

    extended = load_checkpoint(tmp_path / "parts", device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(100, device="cuda")[None]
    out = extended.generate(ids, 3, chunk_len=64)
    assert out.shape == (1, 103) and torch.equal(out[:, :100], ids)
    folder, long, short = ckpt
    asked = f"--base {folder} --ckpt {tmp_path / 'parts'} --data {long} --short_data {short}"
    asked += " --device cuda --original_len 128 --lengths 256 --eval_tokens 512 --samples 1"
    asked += f" --depths 0.5 --out_dir {tmp_path / 'eval'} --cache_dir {tmp_path / 'tokens'}"
    evaluate.main([*asked.split(), "--tasks", "kept", "position"])
    assert (tmp_path / "eval/report.md").exists()


def test_what_only_a_gpu_reaches_is_known_by_name():
    """A branch on the device of a tensor is not run above without a GPU: none may be added
    unseen. Those of a device's name are."""
    found = {}
    for path in [*HERE.glob("*.py"), *HERE.glob("machine/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or path.name.startswith("test_"):
                continue
            text = ast.unparse(function)
            if re.search(r"\.is_cuda|\.type [!=]= 'cuda'|cudart|cuda\.device_of", text):
                found.setdefault(path.relative_to(HERE).as_posix(), set()).add(function.name)
    assert found == ONLY_ON_A_GPU


ENTRIES = ["bench", "evaluate", "tasks"]


@pytest.mark.parametrize("name", ["longred", *ENTRIES])
def test_segments_expand_before_an_entry_asks_for_the_gpu(name, monkeypatch):
    took = [
        path.stem
        for path in sorted((HERE / "measure").glob("*.py"))
        if "__main__" in (text := path.read_text(encoding="utf-8")) and '"--device"' in text
    ]
    assert took == ENTRIES  # a new one is tested too
    settings = []
    monkeypatch.setattr(plan, "_gpu_allocates", lambda: True)

    def asked(*_):
        settings.append(os.environ.get("PYTORCH_ALLOC_CONF"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    for own in (None, "backend:native"):
        with mock.patch.dict(os.environ):
            for variable in plan.ALLOCATOR:
                os.environ.pop(variable, None)
            if own:
                os.environ["PYTORCH_ALLOC_CONF"] = own
            settings.clear()
            with pytest.raises(SystemExit):
                if name == "longred":
                    main(["--ckpt", "x", "--device", "cuda", "--target_len", "9", "--context", "2"])
                importlib.import_module(f"measure.{name}").main(["--help"])
            settings.append(os.environ["PYTORCH_ALLOC_CONF"])
        assert set(settings) == {own or "expandable_segments:True"}

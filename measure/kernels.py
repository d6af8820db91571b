"""Choices that only a GPU can make, each as rows: python -m measure.bench kernels

    attention      flash, cuDNN, the efficient kernel, FA3 where installed, and what the model gets
    weight sums    dW added inside the matmul (model.matmul_adds) or after it
    swiglu, loss   the elementwise lines of the MLP's tiles and of the loss, eager or torch.compile

A hand-written kernel for the last two is worth its lines only where it beats torch.compile of the
same lines, which moves the same bytes; there is none until these rows say that it would.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from measure import bench
from model import add_product, causal_attention, fp32_product, matmul_adds


def bench_kernels(args):
    """Every row of every table; written after each."""
    device = torch.device(args.device)
    result = bench.describe(device) | {"rows": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}", flush=True)
    save = functools.partial(bench.write_result, result, args.out_dir, "kernels")
    for name, make in rows(device).items():
        result["rows"].append(one_row(name, make, args.rounds, device))
        save(quiet=True)
    for text in winners(result["rows"]):
        print(text)
    save()


def one_row(name: tuple, make, rounds: int, device) -> dict:
    """Time what make() returns; what it cannot do here, or has no memory for, is a row too."""
    row = dict(zip(("table", "what", "way"), name, strict=True))
    try:
        run, work, unit = make()
        seconds, _ = bench.timed(run, rounds, device)
        row |= {"seconds": seconds, "rate": work / seconds, "unit": unit}
    except Exception as e:  # a backend refuses in many ways
        lines = str(e).splitlines() or [""]
        row["error"] = f"{type(e).__name__}: {lines[0][:200]}"
    bench.reset_peak(device)
    print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def winners(found: list[dict]) -> list[str]:
    """One line for each comparison: the fastest way, and by how much."""
    said = []
    for key in dict.fromkeys((r["table"], r["what"]) for r in found):
        rows_ = [r for r in found if (r["table"], r["what"]) == key and "seconds" in r]
        rows_.sort(key=lambda r: r["seconds"])
        if len(rows_) > 1:
            first, second = rows_[:2]
            ratio = second["seconds"] / first["seconds"]
            said.append(f"{', '.join(key)}: {first['way']}, {ratio:.2f} x as fast as the next")
    return said


def rows(device) -> dict:
    """(table, what, way) -> a function that makes (run, work, unit of work a second)."""
    gpu, made = device.type == "cuda", {}
    for n_tokens in (1024, 8192, 32768) if gpu else (32,):
        for backward in (False, True):
            what = f"{n_tokens} tokens, {'backward' if backward else 'forward'}"
            for way in ("chosen", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
                made["attention", what, way] = functools.partial(
                    attention, way, n_tokens, backward, device
                )
            made["attention", what, "FA3"] = functools.partial(fa3, n_tokens, backward, device)
    sizes = (4096, 14336, 4096) if gpu else (16, 48, 32)
    for way in ("inside the matmul", "after it"):
        made["weight sums", f"{sizes[0]} tokens", way] = functools.partial(
            weight_sum, way, sizes, device
        )
    for compiled in (False, True) if gpu else (False,):  # compiling for a CPU takes half a minute
        way = "torch.compile" if compiled else "eager"
        for name, lines, shape in (
            ("swiglu", swiglu, (8192, 14336)),
            ("swiglu backward", swiglu_backward, (8192, 14336)),
            ("loss", loss_gradient, (4096, 128256)),
        ):
            shape = shape if gpu else (8, 64)
            made[name, f"{shape[0]} x {shape[1]}", way] = functools.partial(
                elementwise, lines, compiled, shape, device
            )
    return made


def attention(way, n_tokens, backward, device):
    """32 query and 8 kv heads of 128, causal, as Llama-3-8B's."""

    def random(heads):
        shape = 1, n_tokens, heads, 128
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    q, k, v = random(32), random(8), random(8)

    def forward():
        if way == "chosen":
            return causal_attention(q, k, v)
        with sdpa_kernel([getattr(SDPBackend, way)]):
            wide = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)

    work = 2 * 2 * 32 * 128 * n_tokens**2 / 2  # two products over half the square
    if not backward:
        return forward, work, "FLOP/s"
    out = forward()
    grad = torch.randn_like(out)
    run = functools.partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
    return run, 2.5 * work, "FLOP/s"


def fa3(n_tokens, backward, device):
    """The flash backend, with FlashAttention-3 behind it (torch 2.11 or later)."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    def under(function, *given):
        activate_flash_attention_impl("FA3")  # raises where the package is not installed
        try:
            return function(*given)
        finally:
            restore_flash_attention_impl()

    run, work, unit = under(attention, "FLASH_ATTENTION", n_tokens, backward, device)
    return functools.partial(under, run), work, unit


def weight_sum(way, sizes, device):
    """total += dy.T @ x, as the MLP's tiles do it."""
    rows_, d_out, d_in = sizes
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    dy, x, sums = make(rows_, d_out), make(rows_, d_in), [torch.zeros(d_out, d_in, device=device)]
    if way == "after it":
        return (lambda: sums[0].add_(fp32_product(dy.T, x))), 2 * rows_ * d_out * d_in, "FLOP/s"
    if not matmul_adds(device):
        raise ValueError("this torch has no matmul that adds to an fp32 sum here")
    return (lambda: add_product(sums[0], dy.T, x)), 2 * rows_ * d_out * d_in, "FLOP/s"


def swiglu(gate, up):
    return F.silu(gate) * up


def swiglu_backward(grad_act, gate, up):
    """The lines of memory._swiglu_backward that are no matmul: d(gate), d(up), down's input."""
    act = F.silu(gate)
    return torch.ops.aten.silu_backward(grad_act * up, gate), act * grad_act, act * up


def loss_gradient(logits, labels):
    """The lines of model._chunk_nll after its matmul: sum of nll, d(logits)."""
    target, logits = labels[:, None], logits.float()
    lse = logits.logsumexp(-1)
    nll = (lse - logits.gather(-1, target)[:, 0]).sum()
    grad = logits.sub_(lse[:, None]).exp_()
    grad.scatter_add_(-1, target, grad.new_full(target.shape, -1.0))
    return nll, grad.bfloat16()


def elementwise(lines, compiled, shape, device):
    """Bytes that must move: every input read once, every output written once."""
    n = 1 if lines is loss_gradient else lines.__code__.co_argcount
    given = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(n)]
    if lines is loss_gradient:
        given.append(torch.randint(shape[1], shape[:1], device=device))
    if compiled:
        torch.compiler.reset()
        lines = torch.compile(lines, dynamic=False)
    out = lines(*given)
    moved = sum(t.nbytes for t in (*given, *(out if isinstance(out, tuple) else (out,))))
    return functools.partial(lines, *given), moved, "B/s"

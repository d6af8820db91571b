"""Benchmarks against peers and against the machine's own limits, all in one run.

    python bench.py rope                  one GPU: the rotary kernel against its peers and a copy
    python bench.py rope --device cpu     a smoke test of this file; its numbers mean nothing

Every run prints a table and writes it to results/ as JSON, with device, versions, date and command.
"""

import argparse
import functools
import json
import platform
import shlex
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from rope_kernels import apply_rope, rope_backend, rope_frequencies

# ------------------------------------------------------------------------------------------------
# Timing and bookkeeping, shared by the subcommands
# ------------------------------------------------------------------------------------------------


def microseconds(run, sets, device) -> float:
    """Time of one run(*arguments), mean over one pass through sets, in microseconds.

    Sets are visited in turn, so that no cache holds the input of the next call. On a GPU this is
    the device's own time: it is put to sleep first, and finds all calls queued when it wakes.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        for arguments in sets:
            run(*arguments)
        return (time.perf_counter() - start) / len(sets) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # clock cycles, 10 ms: more than the host needs for all sets
    begin.record()
    for arguments in sets:
        run(*arguments)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / len(sets) * 1e3


def host_microseconds(run, device, n_calls=200) -> float:
    """Host time of one call, in microseconds, where run has next to nothing to do on the device."""
    for _ in range(20):
        run()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(n_calls):
        run()
    elapsed = time.perf_counter() - start
    _synchronize(device)
    return elapsed / n_calls * 1e6


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device) -> dict:
    """Where and with what a result was measured."""
    names = ("torch", "triton", "liger-kernel")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = {name: installed.get(name, "none") for name in names}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "smoke_test": device.type == "cpu",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions | {"python": platform.python_version(), "cuda": torch.version.cuda},
    }


def write_result(result, out_dir, name):
    path = Path(out_dir) / f"{name}{'-cpu-smoke' if result['smoke_test'] else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------
# rope
# ------------------------------------------------------------------------------------------------

# Llama-3-8B. Bytes that must move: q and k, read once and written once.
N_HEADS, N_KV_HEADS, HEAD_DIM, THETA = 32, 8, 128, 500_000.0
COPY, OURS = "copy of the same bytes", "longred"


def rope(args):
    """Time and error of rotating q and k, forward and backward."""
    device = torch.device(args.device)
    lengths = args.lengths or ([64, 256] if device.type == "cpu" else [8192, 32768, 131072])
    result = describe(device) | {"backend": rope_backend(device), "rows": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}, path {result['backend']}")
    for n_tokens in lengths:
        rows = rope_at(n_tokens, args.rounds, device)
        result["rows"] += rows
        print_rope(rows, n_tokens)
    result["host_us"] = rope_host(device)
    print(
        "host time of a call, us:", {name: round(us, 1) for name, us in result["host_us"].items()}
    )
    if device.type == "cuda":
        result["verdict"] = rope_verdict(result["rows"])
        print(*(f"{bar}: {met}" for bar, met in result["verdict"].items()), sep="\n")
    else:
        print("CPU smoke test: it shows that this file runs. Not a result.")
    write_result(result, args.out_dir, "rope")


def rope_at(n_tokens, rounds, device):
    """One row for each peer and direction at one length."""
    generator = torch.Generator(device).manual_seed(0)

    def random(n_heads):
        shape = (1, n_tokens, n_heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    # (q, k, gradient of q, gradient of k): 4 sets of at least 168 MB, each more than a cache holds
    sets = [[random(n) for n in (N_HEADS, N_KV_HEADS) * 2] for _ in range(4)]
    flat = [(torch.cat([x.flatten() for x in one[:2]]),) for one in sets]
    target = torch.empty_like(flat[0][0])
    n_bytes = 2 * target.numel() * target.element_size()

    jobs, errors = {(COPY, "both"): (target.copy_, flat)}, {(COPY, "both"): 0.0}
    for name, rotate in rope_peers(n_tokens, device).items():
        forward, backward = [], []
        for *qk, grad_q, grad_k in sets:
            leaves = [x.clone().requires_grad_() for x in qk]  # Liger rotates what it is given
            forward.append(leaves)
            out = rotate(*leaves)
            backward.append((out, leaves, (grad_q.clone(), grad_k.clone())))
        errors[name, "forward"], errors[name, "backward"] = rope_errors(rotate, sets[0])
        jobs[name, "forward"] = rotate, forward
        jobs[name, "backward"] = functools.partial(torch.autograd.grad, retain_graph=True), backward

    times = {key: [] for key in jobs}
    for round_ in range(rounds + 2):  # peers take turns, so that a change of clocks meets all
        for key, (run, arguments) in jobs.items():
            us = microseconds(run, arguments, device)
            if round_ >= 2:  # two rounds of warming up
                times[key].append(us)
    medians = {key: statistics.median(us) for key, us in times.items()}
    return [
        {
            "peer": name,
            "direction": direction,
            "T": n_tokens,
            "us": us,
            "us_all": times[name, direction],
            "GB_per_s": n_bytes / us / 1e3,
            "percent_of_copy": 100 * medians[COPY, "both"] / us,
            "max_error": errors[name, direction],
        }
        for (name, direction), us in medians.items()
    ]


def rope_peers(n_tokens, device):
    """name -> function from q, k in (B, T, heads, H) to both rotated, in the same layout.

    Peers take tables of cos and sin, made once a step and shared by the layers, so they are not
    timed for making them; longred makes its angles inside, and is.
    """
    inv_freq, _ = rope_frequencies(HEAD_DIM, THETA)
    ids, inv_freq = torch.arange(n_tokens, device=device)[None], inv_freq.to(device)
    angle = (ids[..., None].float() * inv_freq.float()).repeat(1, 1, 2)  # (B, T, H), as peers do
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def heads_first(function):  # peers want (B, heads, T, H); both transposes are views
        def rotate(q, k):
            q, k = function(q.transpose(1, 2), k.transpose(1, 2))
            return q.transpose(1, 2), k.transpose(1, 2)

        return rotate

    def eager(q, k):
        def turned(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

        return turned(q), turned(k)

    peers = {OURS: lambda q, k: apply_rope(q, k, ids, inv_freq), "eager": heads_first(eager)}
    if device.type == "cuda":
        torch.compiler.reset()  # each length is compiled for itself
        peers["torch.compile"] = heads_first(torch.compile(eager, dynamic=False))
    else:
        print("torch.compile: left out, half a minute of C++ compiler on a CPU")
    try:
        # Liger's autograd rotates q, k and their gradients in place, where it can.
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        print("Liger-Kernel: left out, not installed (pip install liger-kernel)")
    else:
        if device.type == "cuda":
            peers["Liger"] = heads_first(lambda q, k: liger_rotary_pos_emb(q, k, cos, sin))
    return peers


def rope_errors(rotate, one_set):
    """Largest distance from float64, forward and backward, over the last 1024 positions."""
    q, k, grad_q, grad_k = one_set
    inputs = [x.clone().requires_grad_() for x in (q, k)]
    given = [x.clone() for x in inputs]
    out = rotate(*given)
    grads = torch.autograd.grad(out, inputs, (grad_q.clone(), grad_k.clone()))
    forward = max(_distance(*pair, 1) for pair in zip(out, (q, k), strict=True))
    return forward, max(_distance(*pair, -1) for pair in zip(grads, (grad_q, grad_k), strict=True))


def _distance(out, x, sign):
    n_tokens, last = x.shape[1], slice(-1024, None)
    first, second = x[:, last].double().chunk(2, dim=-1)
    inv_freq = rope_frequencies(HEAD_DIM, THETA)[0].to(x.device)
    positions = torch.arange(n_tokens, device=x.device)[last, None, None].double()
    turn = torch.polar(torch.ones_like(positions * inv_freq), sign * positions * inv_freq)
    exact = torch.complex(first, second) * turn
    exact = torch.cat((exact.real, exact.imag), dim=-1)
    return (out[:, last].double() - exact).abs().max().item()


def rope_host(device):
    """Host time of a call of each peer at T = 1, without and with autograd's bookkeeping."""
    shapes = (1, 1, N_HEADS, HEAD_DIM), (1, 1, N_KV_HEADS, HEAD_DIM)
    plain = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    tracked = [x.clone().requires_grad_() for x in plain]
    host = {}
    for name, rotate in rope_peers(1, device).items():
        host[name] = host_microseconds(functools.partial(rotate, *plain), device)
        host[f"{name}, autograd"] = host_microseconds(functools.partial(rotate, *tracked), device)
    return host


def rope_verdict(rows):
    """The bars this kernel must clear on an H200 at T = 32768, in the directions it has."""
    at = {(r["peer"], r["direction"]): r for r in rows if r["T"] == 32768}
    verdict = {}
    for direction in ("forward", "backward") if at else ():
        ours, compiled = at[OURS, direction], at["torch.compile", direction]
        verdict[f"{direction} <= 175 us"] = ours["us"] <= 175
        verdict[f"{direction} >= 90 % of the copy"] = ours["percent_of_copy"] >= 90
        verdict[f"{direction} not slower than torch.compile"] = ours["us"] <= compiled["us"]
    return verdict


def print_rope(rows, n_tokens):
    print(f"\nT = {n_tokens}, B = 1, {N_HEADS}/{N_KV_HEADS} heads of {HEAD_DIM}, bf16, medians")
    print(f"{'':24}{'':10}{'us':>10}{'GB/s':>8}{'% of copy':>11}{'max error':>11}")
    for row in rows:
        print(
            f"{row['peer']:24}{row['direction']:10}{row['us']:10.1f}{row['GB_per_s']:8.0f}"
            f"{row['percent_of_copy']:11.1f}{row['max_error']:11.1e}"
        )


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("rope", help="rotary kernel against peers and a copy")
    command.set_defaults(run=rope)
    command.add_argument(
        "--lengths",
        type=lambda text: [int(word) for word in text.split(",")],
        help="tokens, comma-separated (default: 8192,32768,131072; on a CPU 64,256)",
    )
    command.add_argument(
        "--rounds", type=int, default=25, help="medians over so many (default: 25)"
    )
    for command in commands.choices.values():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument("--device", default=device, help=f"cuda or cpu (default: {device})")
        command.add_argument("--out_dir", default="results", help="for the JSON (default: results)")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares our mixer with the authors' kernels on the GPU at hand: time, memory, error.

Of SISO, against their Triton kernels; with --mimo of MIMO, against their TileLang kernels; with
--errors nothing but errors of either; with --small updates of the small models of the
state-tracking study, and nothing else; with --mamba2 only whether we read a Mamba-2 checkpoint that
their package writes.

CHECKOUT holds mamba_ssm/ of github.com/state-spaces/mamba. Needs PyTorch, Triton, einops and
safetensors, with --mimo also TileLang; our side is build/mixer_probe (`make`), with --models,
--small and --mamba2 build/mamba3.

Tables go to standard output, progress to standard error.

Time is that of the GPU: medians, caches cold. The authors' scan is mamba3_siso_combined alone, or
mamba3_mimo, on inputs that have every norm, activation and type conversion behind them; ours starts
from the projection. Their Triton kernels choose their launch settings anew for every row, with
--quick for the first row that calls them; those of their TileLang kernels are fixed.

Error is that of everything between in_proj and out_proj against float64: of the authors' Mamba3
module without the two products, and of our mixer_scan and mixer_scan_backward, both from the same
projection in bf16 to the gradient of that projection.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    import triton
    from safetensors.torch import load_file, save_file
except ImportError as missing:
    sys.exit(f"compare_reference: {missing}")

P, N, S, CHUNK = 64, 128, 32, 64  # head dim, state size, rotary angles, tokens of a chunk
HEADS, FEW_HEADS = 64, 8  # of what is timed, and of what is compared with float64
RANK = 4  # of MIMO; a chunk has CHUNK rows, which are pairs of a token and a rank
A_FLOOR, EPS = 1e-4, 1e-5


def fail(message):
    sys.exit(f"compare_reference: {message}")


def say(text):
    print(text, flush=True)


def note(text):
    print(text, file=sys.stderr, flush=True)


def randn(*dims, dtype=torch.bfloat16):
    return torch.randn(*dims, device="cuda", dtype=dtype)


def table(head, rows):
    """Lines of text; the first column is a name, the others are numbers."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in rows)


# ---- The authors' package ----


def add_module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


def add_package(checkout):
    """Makes mamba_ssm importable without what its __init__ wants: the CUDA kernels of Mamba-1."""
    folder = Path(checkout).resolve() / "mamba_ssm"
    if not folder.is_dir():
        fail(f"{checkout} has no mamba_ssm/")
    add_module("mamba_ssm", __path__=[str(folder)])


def open_siso():
    try:
        from mamba_ssm.modules import mamba3
        from mamba_ssm.ops.triton.mamba3 import mamba3_siso_step
    except ImportError as missing:
        fail(f"cannot import the reference package: {missing}")
    return types.SimpleNamespace(
        Mamba3=mamba3.Mamba3,
        scan=mamba3.mamba3_siso_combined,
        step=mamba3_siso_step.mamba3_siso_step,
    )


def open_mimo():
    try:
        import tilelang
        from mamba_ssm.modules import mamba3
        from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo
    except (ImportError, OSError) as missing:
        fail(f"cannot import the MIMO kernels, which need tilelang: {missing}")
    tilelang.set_log_level("WARNING")  # it logs to standard output
    return types.SimpleNamespace(
        Mamba3=mamba3.Mamba3, mimo_scan=mamba3_mimo, tilelang=tilelang.__version__
    )


def scan_arguments(batch, tokens, heads, grad=False):
    """Of the authors' scan, in the types that its kernels take, so that no conversion is timed."""
    dt = F.softplus(randn(batch, heads, tokens, dtype=torch.float32) - 4)
    arguments = dict(
        Q=randn(batch, tokens, 1, N),
        K=randn(batch, tokens, 1, N),
        V=randn(batch, tokens, heads, P),
        ADT=-dt * torch.rand_like(dt),
        DT=dt,
        Trap=randn(batch, heads, tokens),
        Q_bias=torch.ones(heads, N, device="cuda"),
        K_bias=torch.ones(heads, N, device="cuda"),
        Angles=randn(batch, tokens, heads, S),
        D=torch.ones(heads, device="cuda"),
        Z=randn(batch, tokens, heads, P),
    )
    return {name: value.requires_grad_(grad) for name, value in arguments.items()}


def mimo_arguments(batch, tokens, heads, grad=False):
    def f32(*dims):
        return randn(*dims, dtype=torch.float32)

    arguments = dict(
        Q=randn(batch, tokens, RANK, 1, N),
        K=randn(batch, tokens, RANK, 1, N),
        Q_bias=torch.ones(heads, RANK, N, device="cuda"),
        K_bias=torch.ones(heads, RANK, N, device="cuda"),
        MIMO_V=f32(heads, RANK, P) / RANK,
        MIMO_Z=f32(heads, RANK, P),
        MIMO_Out=f32(heads, RANK, P) / RANK,
        Angles=f32(batch, tokens, heads, S),
    )
    arguments = {name: value.requires_grad_(grad) for name, value in arguments.items()}
    return scan_arguments(batch, tokens, heads, grad) | arguments


MIMO_SETTINGS = dict(chunk_size=CHUNK // RANK, rotary_dim_divisor=N // S, dtype=torch.bfloat16)


def step_arguments(batch, heads):
    dt = 0.05 * torch.rand(batch, heads, device="cuda")
    return dict(
        Q=randn(batch, 1, N),
        K=randn(batch, 1, N),
        V=randn(batch, heads, P),
        ADT=-dt * torch.rand_like(dt),
        DT=dt,
        Trap=randn(batch, heads),
        Q_bias=torch.ones(heads, N, device="cuda"),
        K_bias=torch.ones(heads, N, device="cuda"),
        Angles=randn(batch, heads, S),
        D=torch.ones(heads, device="cuda"),
        Z=randn(batch, heads, P),
        Input_States=(
            randn(batch, heads, S, dtype=torch.float32),
            randn(batch, heads, P, N, dtype=torch.float32),
            randn(batch, heads, N, dtype=torch.float32),
            randn(batch, heads, P),
        ),
    )


def prepare_scan(authors, batch, tokens, heads):
    arguments = scan_arguments(batch, tokens, heads)

    def call():
        with torch.no_grad():
            return authors.scan(**arguments, chunk_size=CHUNK, return_final_states=True)

    return call


def prepare_train(authors, batch, tokens, heads):
    arguments = scan_arguments(batch, tokens, heads, grad=True)
    d_y = randn(batch, tokens, heads, P)

    def call():
        y = authors.scan(**arguments, chunk_size=CHUNK)
        return torch.autograd.grad(y, list(arguments.values()), d_y)

    return call


def prepare_mimo_scan(authors, batch, tokens, heads):
    arguments = mimo_arguments(batch, tokens, heads)

    def call():
        with torch.no_grad():
            return authors.mimo_scan(**arguments, **MIMO_SETTINGS, return_state=True)

    return call


def prepare_mimo_train(authors, batch, tokens, heads):
    arguments = mimo_arguments(batch, tokens, heads, grad=True)
    d_y = randn(batch, tokens, heads, P)

    def call():
        y = authors.mimo_scan(**arguments, **MIMO_SETTINGS)
        return torch.autograd.grad(y, list(arguments.values()), d_y)

    return call


def prepare_layer(authors, batch, tokens, heads):
    width = heads * P // 2
    layer = authors.Mamba3(
        width, d_state=N, headdim=P, chunk_size=CHUNK, device="cuda", dtype=torch.bfloat16
    )
    u = randn(batch, tokens, width).requires_grad_()
    d_out = randn(batch, tokens, width)
    return lambda: torch.autograd.grad(layer(u), [u, *layer.parameters()], d_out)


def prepare_steps(authors, batch, heads):
    """Steps of different sequences as a graph, and how many: their states do not fit the L2."""
    count = min(256, max(2, (512 << 20) // (batch * heads * P * N * 4)))
    calls = [step_arguments(batch, heads) for _ in range(count)]
    authors.step(**calls[0])  # chooses its settings
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, or all steps would write their states to the same memory.
        results = [authors.step(**arguments) for arguments in calls]

    def call():
        graph.replay()
        return calls, results

    return call, count


# ---- The settings of the authors' kernels ----
# Each kernel tries its list of launch settings, all kernels together hundreds, when it is first
# called. Compiled one after the other that takes many minutes, so processes side by side first
# compile a part each into Triton's cache on the disk.


def tuners():
    kind = triton.runtime.autotuner.Autotuner
    modules = [m for name, m in sys.modules.items() if name.startswith("mamba_ssm.")]
    found = [value for m in modules for value in vars(m).values() if isinstance(value, kind)]
    return list({id(tuner): tuner for tuner in found}.values())


def tune_briefly():
    for tuner in tuners():
        tuner.do_bench = lambda call, quantiles: triton.testing.do_bench(
            call, warmup=5, rep=30, quantiles=quantiles
        )


def compile_part(authors, part, parts):
    tune_briefly()
    for tuner in tuners():
        configs = tuner.configs
        # Two at least: a tuner with a choice passes over settings that the card has no room for.
        count = max(2, math.ceil(len(configs) / parts))
        tuner.configs = [configs[(part + i * parts) % len(configs)] for i in range(count)]
    prepare_scan(authors, 1, 2048, HEADS)()
    for heads in (HEADS, FEW_HEADS):
        prepare_train(authors, 2, 1024, heads)()
    authors.step(**step_arguments(1, HEADS))
    torch.cuda.synchronize()


def compile_ahead(checkout):
    parts = min(16, os.cpu_count())
    command = [sys.executable, __file__, checkout, "--compile-part"]
    running = [
        subprocess.Popen([*command, f"{i}/{parts}"], stderr=subprocess.DEVNULL)
        for i in range(parts)
    ]
    failed = sum(process.wait() != 0 for process in running)
    note(f"compiled the authors' kernels in {parts} processes, of which {failed} failed")


def remember_settings(chosen, forget):
    """Adds what the kernels chose to {kernel: {text: settings}}; they may have to choose again."""
    for tuner in tuners():
        of_kernel = chosen.setdefault(tuner.base_fn.__name__, {})
        of_kernel.update({str(config): config for config in tuner.cache.values()})
        if forget:
            tuner.cache.clear()


def save_settings(chosen, path):
    fields = ("kwargs", "num_warps", "num_stages", "maxnreg")
    listed = {
        kernel: [{field: getattr(config, field) for field in fields} for config in configs.values()]
        for kernel, configs in chosen.items()
        if configs
    }
    Path(path).write_text(json.dumps(listed, indent=1) + "\n")


def load_settings(path):
    listed = json.loads(Path(path).read_text())
    for tuner in tuners():
        if tuner.base_fn.__name__ in listed:
            settings = listed[tuner.base_fn.__name__]
            tuner.configs = [triton.Config(**fields) for fields in settings]


# ---- Time and memory ----


@dataclass
class Work:
    kind: str  # as in mixer_probe time --work
    batch: int
    tokens: int = 1
    rank: int = 1  # more is MIMO

    def __str__(self):
        name = {
            "scan": "forward",
            "train": "forward + backward",
            "layer": f"layer D={HEADS * P // 2}, fwd + bwd",
            "step": "step",
        }[self.kind]
        return f"{name}, B={self.batch}" + (f" T={self.tokens}" if self.kind != "step" else "")


WORKS = [
    Work("scan", 8, 2048),
    Work("scan", 1, 16384),
    Work("scan", 1, 65536),
    Work("train", 8, 2048),
    Work("train", 1, 16384),
    Work("step", 1),
    Work("step", 128),
    Work("layer", 8, 2048),
]
MIMO_WORKS = [
    Work("scan", 8, 2048, RANK),
    Work("scan", 1, 16384, RANK),
    Work("train", 8, 2048, RANK),
    Work("train", 1, 16384, RANK),
]


@dataclass
class Cost:
    ms: float = math.nan
    bytes: float = math.nan  # the most at once, arguments and results included


def median_ms(call, quick):
    warmup, rep = (25, 100) if quick else (100, 500)
    return triton.testing.do_bench(call, warmup=warmup, rep=rep, return_mode="median")


def cost_of_authors(authors, work, quick):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    if work.kind == "step":
        call, count = prepare_steps(authors, work.batch, HEADS)
        return Cost(median_ms(call, quick) / count)
    siso = {"scan": prepare_scan, "train": prepare_train, "layer": prepare_layer}
    mimo = {"scan": prepare_mimo_scan, "train": prepare_mimo_train}
    prepare = (mimo if work.rank > 1 else siso)[work.kind]
    call = prepare(authors, work.batch, work.tokens, HEADS)
    call()  # compiles and chooses settings, which takes memory
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return Cost(median_ms(call, quick), peak)


def run(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        fail(f"cannot run {command[0]}: {error.strerror}")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fail(f"{' '.join(command)} failed: {reason}")
    return done.stdout


def cost_of_ours(probe, work, quick):
    shape = {
        "work": work.kind,
        "batch": work.batch,
        "tokens": work.tokens,
        "heads": HEADS,
        "head-dim": P,
        "state-size": N,
        "rank": work.rank,
        "angles": S,
        "min-time": 0.1 if quick else 0.5,
    }
    flags = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    measured = json.loads(run(probe, "time", "--device", "cuda", *flags))
    return Cost(1e3 * measured["seconds"], measured["peak_bytes"] or math.nan)


def cost_table(costs):
    def gb(size):
        return "" if math.isnan(size) else f"{size * 1e-9:.2f} GB"

    rows = [
        (work, f"{a.ms:.4f} ms", f"{o.ms:.4f} ms", f"{a.ms / o.ms:.2f}", gb(a.bytes), gb(o.bytes))
        for work, a, o in costs
    ]
    return table(["work", "authors", "ours", "ratio", "authors' peak", "our peak"], rows)


def compare_costs(authors, probe, works, quick, chosen, forget):
    costs = []
    for work in works:
        theirs = cost_of_authors(authors, work, quick)
        remember_settings(chosen, forget)
        torch.cuda.empty_cache()  # room for the other process
        costs.append((work, theirs, cost_of_ours(probe, work, quick)))
        note(cost_table(costs[-1:]).splitlines()[-1])
    return cost_table(costs)


# ---- The mathematics ----


def parts_of_projection(heads, rank):
    inner = heads * P
    sizes = {"z": inner, "x": inner, "B": rank * N, "C": rank * N}
    return sizes | {"dd_dt": heads, "dd_A": heads, "trap": heads, "angle": S}


def split_projection(proj, heads, rank):
    parts = parts_of_projection(heads, rank)
    return dict(zip(parts, proj.split(list(parts.values()), dim=-1)))


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate(x, phi, halves):
    """Turns pair i by phi[..., i]: neighbours (2i, 2i+1), or with halves (i, i + N/2); i < S."""
    pairs = x.unflatten(-1, (2, N // 2) if halves else (N // 2, 2))
    a, b = pairs.unbind(-2 if halves else -1)
    phi = F.pad(phi, (0, N // 2 - S))
    cos, sin = torch.cos(phi), torch.sin(phi)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2 if halves else -1).flatten(-2)


def by_chunk(x):
    """(B, T, H, R, X) as (B, chunks, H, CHUNK, X), where rows are (t, r)."""
    tokens = CHUNK // x.shape[3]
    return x.unflatten(1, (x.shape[1] // tokens, tokens)).transpose(2, 3).flatten(3, 4)


def mixer(proj, params):
    """The chunked scan of docs/mathematics.md in the precision of proj: y and the final states."""
    heads, rank = params["B_bias"].shape[:2]
    mimo = "mimo_x" in params
    part = split_projection(proj, heads, rank)
    x, z = (part[name].unflatten(-1, (heads, 1, P)) for name in ("x", "z"))
    dt = F.softplus(part["dd_dt"] + params["dt_bias"])
    dd_A = part["dd_A"]
    act = torch.where(dd_A >= 0, 1 + dd_A, 1 / (1 - dd_A.clamp(max=0)))  # the heavy tail
    log_decay = -act.clamp(min=A_FLOOR) * dt
    gamma = torch.sigmoid(part["trap"]) * dt
    next_beta = F.pad((dt - gamma)[:, 1:], (0, 0, 0, 1))
    phi = torch.cumsum(math.pi * torch.tanh(part["angle"])[:, :, None] * dt[..., None], dim=1)

    def rotated(raw, weight, bias):
        normed = rms_norm(raw.unflatten(-1, (1, rank, N)), weight)
        return rotate(normed + bias, phi[..., None, :], halves=mimo)

    def of_rows(terms):
        """(B, T, H) of tokens as (B, chunks, H, CHUNK, 1)."""
        return by_chunk(terms[..., None, None].expand(-1, -1, -1, rank, 1))

    k = rotated(part["B"], params["B_norm"], params["B_bias"])
    q = rotated(part["C"], params["C_norm"], params["C_bias"])
    v = x * params["mimo_x"] if mimo else x

    q_, k_, v_ = by_chunk(q), by_chunk(k), by_chunk(v)
    scale, gamma = of_rows(gamma + next_beta), of_rows(gamma)
    by_token = log_decay.unflatten(1, (-1, CHUNK // rank))
    c = of_rows(by_token.cumsum(2).flatten(1, 2))
    token = torch.arange(CHUNK, device=proj.device) // rank
    later, same = token[:, None] > token, token[:, None] == token
    decay = torch.exp((c - c.mT).masked_fill(~later, -math.inf))
    weights = (q_ @ k_.mT) * (decay * scale.mT + same * gamma.mT)
    total = c[..., -1:, :]
    added = v_.mT @ (k_ * (torch.exp(total - c) * scale))
    state, states = torch.zeros_like(added[:, 0]), []
    for i in range(added.shape[1]):
        states.append(state)
        state = torch.exp(total[:, i]) * state + added[:, i]
    y = weights @ v_ + torch.exp(c) * (q_ @ torch.stack(states, dim=1).mT)
    y = y.unflatten(3, (-1, rank)).transpose(2, 3).flatten(1, 2)
    y = y + params["D"][:, None, None] * v
    if mimo:
        y = y * F.silu(z * params["mimo_z"]) * params["mimo_o"]
    else:
        y = y * F.silu(z)
    y = y.sum(3).flatten(-2)
    k_prev = k[:, -1].transpose(1, 2)
    return {"y": y, "angle": phi[:, -1], "ssm": state, "k_prev": k_prev, "v_prev": x[:, -1]}


# ---- Error ----


@dataclass
class Case:
    name: str
    batch: int = 2
    tokens: int = 1024
    dt: tuple = (1e-3, 1e-1)  # the steps of a new model
    dd_A: float = 0.0  # mean


CASES = [
    Case("normal"),
    Case("strong decay", dt=(0.5, 2.0), dd_A=8.0),
    Case("decay near 1", dt=(1e-4, 1e-3), dd_A=-50.0),
    Case("16384 tokens", batch=1, tokens=16384),
]


def make_inputs(case, heads, rank):
    torch.manual_seed(1)
    proj = randn(case.batch, case.tokens, sum(parts_of_projection(heads, rank).values()))
    split_projection(proj, heads, rank)["dd_A"].add_(case.dd_A)
    low, high = map(math.log, case.dt)
    dt = torch.exp(low + (high - low) * torch.rand(heads, device="cuda"))

    def near_one(*dims):
        return 1 + 0.2 * randn(*dims, dtype=torch.float32)

    params = {
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # inverse of softplus
        "B_bias": near_one(heads, rank, N),
        "C_bias": near_one(heads, rank, N),
        "B_norm": near_one(N),
        "C_norm": near_one(N),
        "D": near_one(heads),
    }
    if rank > 1:
        params["mimo_x"] = near_one(heads, rank, P) / rank
        params["mimo_z"] = near_one(heads, rank, P)
        params["mimo_o"] = near_one(heads, rank, P) / rank
    return proj, params, randn(case.batch, case.tokens, heads * P)


def results_of_mathematics(proj, params, d_y):
    proj = proj.double().requires_grad_()
    params = {name: value.double().requires_grad_() for name, value in params.items()}
    results = mixer(proj, params)
    gradients = torch.autograd.grad(results["y"], [proj, *params.values()], d_y.double())
    results = {name: value.detach() for name, value in results.items()}
    return results | dict(zip(["d_proj", *(f"d_{name}" for name in params)], gradients))


def results_of_authors(authors, proj, params, d_y):
    heads, rank = params["B_bias"].shape[:2]
    module = authors.Mamba3(
        heads * P // 2,
        d_state=N,
        headdim=P,
        A_floor=A_FLOOR,
        is_mimo=rank > 1,
        mimo_rank=rank,
        chunk_size=CHUNK // rank,
        layer_idx=0,
        device="cuda",
        dtype=torch.float32,
    )
    module.in_proj, module.out_proj = torch.nn.Identity(), torch.nn.Identity()
    module.in_proj.weight = torch.empty(0, device="cuda")  # its dtype becomes that of the states
    named = {
        name: module.get_parameter(name + ".weight" if name.endswith("norm") else name)
        for name in params
    }
    module.requires_grad_(False)
    for name, value in params.items():
        named[name].copy_(value)
    cache = types.SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    module(proj, inference_params=cache)
    angle, ssm, k_prev, v_prev = cache.key_value_memory_dict[0]

    module.requires_grad_(True)
    proj = proj.clone().requires_grad_()
    y = module(proj)
    gradients = torch.autograd.grad(y, [proj, *named.values()], d_y)
    results = {"y": y.detach(), "angle": angle, "ssm": ssm, "k_prev": k_prev, "v_prev": v_prev}
    return results | dict(zip(["d_proj", *(f"d_{name}" for name in named)], gradients))


def results_of_ours(probe, proj, params, d_y):
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = f"{folder}/inputs.safetensors", f"{folder}/outputs.safetensors"
        save_file(params | {"proj": proj, "d_y": d_y}, inputs)
        run(probe, "compute", inputs, outputs, "--device", "cuda")
        return load_file(outputs, device="cuda")


def comparable(results, rank):
    """In float64, d_proj by its parts, and angles as points of the circle: 0 is as good as 2 pi."""
    results = {name: value.double() for name, value in results.items()}
    for part, value in split_projection(results.pop("d_proj"), FEW_HEADS, rank).items():
        results[f"d_{part}"] = value
    angle = results["angle"]
    results["angle"] = torch.stack([torch.cos(angle), torch.sin(angle)])
    return results


@dataclass
class Error:
    norm: float  # of the difference, relative to that of the result
    worst: float  # element of the difference, relative to the largest of the result


def errors_of(got, want):
    errors = {}
    for name, value in want.items():
        difference = got[name].reshape(value.shape) - value
        norm = (difference.norm() / value.norm()).item()
        errors[name] = Error(norm, (difference.abs().max() / value.abs().max()).item())
    return errors


def error_table(theirs, ours):
    rows = []
    for name in theirs:
        pair = theirs[name], ours[name]
        cells = [e.norm for e in pair] + [e.worst for e in pair]
        rows.append([name, *(f"{cell:.1e}" for cell in cells)])
    return table(["result", "norm: authors", "ours", "worst: authors", "ours"], rows)


def say_errors(authors, probe, rank):
    """For each case, as soon as it is known, the errors of the authors and ours by result."""
    for case in CASES:
        inputs = make_inputs(case, FEW_HEADS, rank)
        want = comparable(results_of_mathematics(*inputs), rank)
        theirs = comparable(results_of_authors(authors, *inputs), rank)
        torch.cuda.empty_cache()
        ours = comparable(results_of_ours(probe, *inputs), rank)
        what = f"{case.name}, R={rank} B={case.batch} T={case.tokens} H={FEW_HEADS}"
        errors = error_table(errors_of(theirs, want), errors_of(ours, want))
        say(f"\nAgainst float64, {what}\n{errors}")


# ---- Whole models ----


@dataclass
class Run:
    size: str
    mode: str
    batch: int
    tokens: int


RUNS = [
    Run("187m", "train", 8, 2048),
    Run("187m", "prefill", 1, 16384),
    Run("1.5b", "train", 4, 2048),
    Run("1.5b", "prefill", 1, 16384),
]
WIDTH_LAYERS_MLP = {"187m": (768, 12, 1536), "1.5b": (2048, 24, 4096)}
VOCABULARY = 128256


def import_models():
    """The authors' language model and its config, without what only generation needs."""
    add_module("mamba_ssm.modules.mamba_simple", Mamba=None)
    add_module("mamba_ssm.utils.generation", GenerationMixin=object)
    add_module("mamba_ssm.utils.hf", load_config_hf=None, load_state_dict_hf=None)
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError as missing:
        fail(f"cannot import the reference models: {missing}")
    return MambaConfig, MambaLMHeadModel


def open_models():
    """Makes models of Mamba-3 of the authors."""
    add_module("mamba_ssm.modules.mamba2", Mamba2=None)
    MambaConfig, MambaLMHeadModel = import_models()

    def make(width, layers, mlp, vocabulary, dtype, **mixer_settings):
        config = MambaConfig(
            d_model=width,
            d_intermediate=mlp,
            n_layer=layers,
            vocab_size=vocabulary,
            ssm_cfg=dict(layer="Mamba3", chunk_size=CHUNK, **mixer_settings),
            pad_vocab_size_multiple=16,
            tie_embeddings=True,
        )
        return MambaLMHeadModel(config, device="cuda", dtype=dtype)

    return make


def make_published(make_model, size, dtype):
    return make_model(*WIDTH_LAYERS_MLP[size], VOCABULARY, dtype, d_state=N, headdim=P)


def prepare_prefill(make_model, what):
    model = make_published(make_model, what.size, torch.bfloat16)
    ids = torch.randint(VOCABULARY, (what.batch, what.tokens), device="cuda")

    def call():
        with torch.no_grad():
            return model(ids, num_last_tokens=1)

    return call


def prepare_update(model, vocabulary, batch, tokens, precision):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(vocabulary, (batch, tokens + 1), device="cuda")

    def call():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return call


def model_ms_of_authors(make_model, what, quick):
    if what.mode == "train":
        model = make_published(make_model, what.size, torch.float32)
        call = prepare_update(model, VOCABULARY, what.batch, what.tokens, "bf16")
    else:
        call = prepare_prefill(make_model, what)
    return median_ms(call, quick)


def model_ms_of_ours(program, what):
    flags = ["--size", f"{what.size}-siso", "--mode", what.mode]
    flags += ["--batch", str(what.batch), "--tokens", str(what.tokens)]
    lines = run(program, "bench", "model", "--json", "--device", "cuda", *flags).splitlines()
    rows = [row for row in map(json.loads, lines) if row["op"] == f"model_{what.mode}"]
    return 1e3 * rows[0]["median_s"]


def compare_models(program, quick):
    make_model = open_models()
    rows = []
    for what in RUNS:
        if quick and what.size != RUNS[0].size:
            continue
        tokens = what.batch * what.tokens
        theirs = tokens / model_ms_of_authors(make_model, what, quick)
        torch.cuda.empty_cache()
        ours = tokens / model_ms_of_ours(program, what)
        name = f"{what.size} {what.mode}, B={what.batch} T={what.tokens}"
        rows.append((name, f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"))
        note(" ".join(rows[-1]))
    return table(["thousand tokens/s", "authors", "ours", "ratio"], rows)


# ---- Small models ----

# Of the study: one layer learns parity, three learn modular arithmetic.
SMALL = dict(batch=256, tokens=160, width=64, d_state=64, headdim=32, vocabulary=16)
SMALL_LAYERS = [1, 3]
SMALL_SETTINGS = 4  # that a kernel of theirs chooses from: compiling takes longer than measuring


def small_ms_of_authors(make_model, layers, precision, quick):
    model = make_model(
        SMALL["width"],
        layers,
        0,
        SMALL["vocabulary"],
        torch.float32,
        d_state=SMALL["d_state"],
        headdim=SMALL["headdim"],
    )
    sizes = SMALL["vocabulary"], SMALL["batch"], SMALL["tokens"]
    return median_ms(prepare_update(model, *sizes, precision), quick)


def small_ms_of_ours(program, layers, updates=300):
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(
            task="modular_arithmetic",
            layers=layers,
            d_model=SMALL["width"],
            d_state=SMALL["d_state"],
            headdim=SMALL["headdim"],
            batch=SMALL["batch"],
            min_length=SMALL["tokens"],
            max_length=SMALL["tokens"],
            steps=updates,
            val_every=0,
            save_every=0,
            dtype="f32",
            device="cuda",
            output=f"{folder}/run",
        )
        named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
        run(program, "train", *(word for pair in named for word in pair))
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines[updates // 3 : updates - 1]]
    return 1e3 * (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def compare_small(program, quick):
    make_model = open_models()
    tune_briefly()
    for tuner in tuners():
        tuner.configs = tuner.configs[:SMALL_SETTINGS]
    rows = []
    for layers in SMALL_LAYERS:
        ours = small_ms_of_ours(program, layers)
        for precision in ("f32", "bf16"):
            try:
                theirs = small_ms_of_authors(make_model, layers, precision, quick)
            except Exception as problem:  # what their kernels do not take, they refuse in many ways
                note(f"{layers} layers, {precision}: {problem}")
                continue
            cells = f"{1e3 / theirs:.1f}", f"{1e3 / ours:.1f}", f"{theirs / ours:.2f}"
            rows.append((f"{layers}", precision, *cells))
            note(" ".join(rows[-1]))
    return table(["layers", "theirs in", "authors", "ours in f32", "ratio"], rows)


# ---- Mamba-2 ----


def open_mamba2():
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        add_module("huggingface_hub", PyTorchModelHubMixin=object)
    add_module("mamba_ssm.modules.mamba3", Mamba3=None)
    return import_models()


def compare_mamba2(program):
    """Logits of a checkpoint of the authors with random weights, by them and by us, in f32."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # else their products of f32 are in tf32
    MambaConfig, MambaLMHeadModel = open_mamba2()
    # As the published mamba2-130m.
    config = MambaConfig(
        d_model=768,
        n_layer=24,
        vocab_size=50277,
        ssm_cfg={"layer": "Mamba2"},
        pad_vocab_size_multiple=16,
        tie_embeddings=True,
    )
    for tuner in tuners():  # any settings will do; two, as in compile_part()
        tuner.configs = tuner.configs[:2]
    torch.manual_seed(1)
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.float32)
    for block in model.backbone.layers:
        block.mixer.use_mem_eff_path = False  # it wants the package causal_conv1d
    ids = torch.randint(config.vocab_size, (2, 1000), device="cuda")
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():  # also those that begin as ones or zeros
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        theirs = model(ids).logits.double()
        tokens, output = f"{folder}/tokens.json", f"{folder}/logits.safetensors"
        Path(tokens).write_text(json.dumps(ids.tolist()))
        for name, flags in {
            "all tokens at once": [],
            "the second half token by token": ["--split", "500"],
        }.items():
            flags += ["--device", "cuda", "--dtype", "f32", "--tokens", tokens, "-o", output]
            run(program, "logits", "-m", folder, *flags)
            ours = load_file(output, device="cuda")["logits"].double()
            difference = ours[..., : config.vocab_size] - theirs[..., : config.vocab_size]
            worst = difference.abs().max() / theirs.abs().max()
            same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
            cells = difference.norm() / theirs.norm(), worst, same
            rows.append([name, *(f"{cell.item():.2g}" for cell in cells)])
    return table(["ours", "norm of the difference", "worst", "same best token"], rows)


# ---- The program ----


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", metavar="CHECKOUT")
    parser.add_argument("--probe", default="build/mixer_probe", metavar="PROGRAM")
    parser.add_argument("--mamba3", default="build/mamba3", metavar="PROGRAM")
    parser.add_argument("--quick", action="store_true", help="measure for a shorter time")
    parser.add_argument("--models", action="store_true", help="whole models too")
    parser.add_argument(
        "--mimo",
        action="store_true",
        help=f"MIMO of rank {RANK} instead of SISO; before their first calls TileLang "
        "compiles the authors' kernels, which takes minutes",
    )
    parser.add_argument("--errors", action="store_true", help="only errors, no times")
    parser.add_argument("--small", action="store_true", help="only updates of small models")
    parser.add_argument(
        "--mamba2",
        action="store_true",
        help="only logits of a Mamba-2 checkpoint of theirs; Triton compiles for some minutes first",
    )
    parser.add_argument(
        "--tuned",
        metavar="FILE",
        help="launch settings that the authors' kernels chose before on such a card, and choose "
        "from now; written if there is no such file",
    )
    parser.add_argument("--compile-part", metavar="I/PARTS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    alone = arguments.mimo + arguments.small + arguments.mamba2
    if alone > 1 or alone and (arguments.models or arguments.tuned):
        parser.error("--mimo, --small and --mamba2 go alone, without --models and --tuned")
    return arguments


def compare_mimo(authors, probe, quick):
    if quick:
        tune_briefly()
    costs = compare_costs(authors, probe, MIMO_WORKS, quick, chosen={}, forget=not quick)
    say(f"\nMIMO, R={RANK} H={HEADS} P={P} N={N} G=1, bf16\n{costs}")
    say_errors(authors, probe, RANK)


def main():
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        fail("there is no GPU")
    add_package(arguments.checkout)
    if not arguments.mamba2:
        authors = open_mimo() if arguments.mimo else open_siso()
    if arguments.compile_part:
        return compile_part(authors, *map(int, arguments.compile_part.split("/")))
    whole = arguments.small or arguments.mamba2
    programs = [arguments.probe] * (not whole) + [arguments.mamba3] * (arguments.models or whole)
    for program in programs:
        if not os.access(program, os.X_OK):
            fail(f"there is no program {program}: build it first")

    say(f"{torch.cuda.get_device_name()}, {datetime.date.today()}")
    tilelang = f", TileLang {authors.tilelang}" if arguments.mimo else ""
    say(f"PyTorch {torch.__version__}, Triton {triton.__version__}{tilelang}")
    say("command: " + " ".join(sys.argv))
    if arguments.small:
        say(f"\nUpdates a second, {SMALL}\n{compare_small(arguments.mamba3, arguments.quick)}")
        return
    if arguments.mamba2:
        say(f"\nLogits of a Mamba-2 checkpoint\n{compare_mamba2(arguments.mamba3)}")
        return
    if arguments.errors:
        tune_briefly()
        return say_errors(authors, arguments.probe, RANK if arguments.mimo else 1)
    if arguments.mimo:
        return compare_mimo(authors, arguments.probe, arguments.quick)
    tuned = arguments.tuned is not None and Path(arguments.tuned).exists()
    if tuned:
        load_settings(arguments.tuned)
    else:
        compile_ahead(arguments.checkout)
    if arguments.quick:
        tune_briefly()

    chosen = {}
    # First, so that the settings are chosen for these shapes and not for the small ones below.
    costs = compare_costs(
        authors,
        arguments.probe,
        WORKS,
        arguments.quick,
        chosen,
        forget=tuned or not arguments.quick,
    )
    say(f"\nH={HEADS} P={P} N={N} G=1, bf16\n{costs}")
    if arguments.tuned and not tuned:
        save_settings(chosen, arguments.tuned)
    say_errors(authors, arguments.probe, rank=1)
    remember_settings(chosen, forget=False)
    if arguments.tuned and not tuned:
        save_settings(chosen, arguments.tuned)
    if arguments.models:
        say(f"\n{compare_models(arguments.mamba3, arguments.quick)}")


if __name__ == "__main__":
    main()

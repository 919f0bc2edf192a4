#!/usr/bin/env python3
"""tools/bench_peers.py BENCH.json --out MERGED.json: PyTorch beside our kernels, on the same GPU and the same shapes.

Reads what `fiedler bench --json` wrote, times the peer of each case that has one, and adds to its row peer, peer_time_us
and ratio (peer's time / ours: above 1 we are faster). Where a case has several peers the fastest counts; all of them are
kept under "peers". A case without a peer, or whose peer fails, says why in `peer`. "pairs": attention forward and
backward together, ours the sum of both rows, the peers' timed as one.

Method as in tests/bench/harness.cpp: each sample is one run after the L2 cache has been overwritten, the time is the
median, runs under 10 us are timed 20 at a time. A short sleep on the GPU before each sample lets PyTorch queue its
kernels ahead, so that the cost of launching them from Python is not counted against it.

Shapes come from the names of the cases: see the FAMILIES table and the files tests/bench/*_bench.cpp.
"""
import argparse
import collections
import json
import pathlib
import re
import statistics
import sys

DEVICE = "cuda"
torch = None  # imported in main: the rest of this file is also read where there is no PyTorch
CHANNELS = 384  # heads x width of a head in the attention cases
FORWARD_BACKWARD = "forward+backward"
DIRECTIONS = ("forward", "backward", FORWARD_BACKWARD)


class NoPeer(Exception):
    """Why a case has no peer."""


# ---- shapes from names ------------------------------------------------------------------------------------------------------


def shape_of(case, dimensions):
    """The AxB... of a case name, as so many numbers."""
    for found in re.findall(r"\d+(?:x\d+)*", case):
        sizes = [int(size) for size in found.split("x")]
        if len(sizes) == dimensions:
            return sizes
    raise NoPeer(f"no {dimensions} sizes in the name '{case}'")


def word_number(case, word, default):
    found = re.search(rf"\b{word}\s*=?\s*(\d+)", case)
    return int(found.group(1)) if found else default


Attention = collections.namedtuple("Attention", "count heads length width causal window scalars")


def attention_shape(case):
    """What an attention case computes; NoPeer for what PyTorch has no call for. scalars: 0 for a dot product."""
    if case.split()[0] not in DIRECTIONS:
        raise NoPeer("decoding has no peer in one call")
    if re.search(r"\bragged\b", case):
        raise NoPeer("scaled_dot_product_attention takes no packed sequences")
    count, length = word_number(case, "B", 0), word_number(case, "T", 0)
    if not count or not length:
        count, length = shape_of(case, 2)
    width = word_number(case, "(?:width|D)", 64)
    heads = word_number(case, "(?:heads|H)", CHANNELS // width)
    return Attention(count, heads, length, width, "bidirectional" not in case, word_number(case, "window", 0),
                     word_number(case, "R", 0))


# ---- peers ------------------------------------------------------------------------------------------------------------------
# Each function returns {name of the peer: function without arguments that runs it}.


def bf16(*shape, grad=False, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().requires_grad_(grad)


def gradient(output, inputs, direction):
    return lambda: torch.autograd.grad(output, inputs, direction, retain_graph=True)


def attention(case):
    from torch.nn.attention import SDPBackend

    s, direction = attention_shape(case), case.split()[0]
    peers = {}
    if not s.window:
        peers = {"cuDNN SDPA": sdpa(s, direction, SDPBackend.CUDNN_ATTENTION),
                 "FlashAttention SDPA": sdpa(s, direction, SDPBackend.FLASH_ATTENTION)}
    # FlexAttention is compiled for each shape, which takes seconds: for one of each kind.
    if direction == "forward" and (s.window or (s.scalars in (1, 8) and s.count * s.length == 65536)):
        peers["FlexAttention" + (", distance score" if s.scalars else "")] = flex_forward(s)
    if not peers:
        raise NoPeer("scaled_dot_product_attention has no window")
    return peers


LONG = 131072  # tokens from which on a peer's quadratic time is that of one head, times the heads


def attention_tree(case):
    """The same function in near-linear time: beside dot-product attention, which has no such form."""
    from torch.nn.attention import SDPBackend

    s, direction = attention_shape(case), case.split()[0]
    if "leaf" in case:
        raise NoPeer("another tuning of a case that has one")
    if s.length < LONG:
        return {"cuDNN SDPA": sdpa(s, direction, SDPBackend.CUDNN_ATTENTION)}
    return {f"cuDNN SDPA, one head x {s.heads}": Scaled(sdpa(s._replace(heads=1), direction, SDPBackend.CUDNN_ATTENTION),
                                                         s.heads)}


class Scaled:
    """A run whose time counts `times` over, and which is long enough to be timed twice only."""

    def __init__(self, run, times):
        self.run, self.times = run, times

    def __call__(self):
        return self.run()


def head(case):
    rows, channels, vocab = shape_of(case, 3)
    with_gradient = "gradient" in case
    x, w = bf16(rows, channels, grad=with_gradient), bf16(vocab, channels, grad=with_gradient, scale=0.02)
    targets = torch.randint(vocab, (rows,), device="cuda")
    functional = torch.nn.functional
    compiled = torch.compile(lambda a, b: functional.cross_entropy(functional.linear(a, b).float(), targets))
    if with_gradient:
        return {"linear and cross_entropy, compiled": lambda: torch.autograd.grad(compiled(x, w), (x, w))}
    return {"linear and cross_entropy, compiled": lambda: no_grad(compiled, x, w)}


def sdpa(s, direction, backend):
    from torch.nn.attention import sdpa_kernel

    # [B, T, H, D] in memory, as a transformer's projections leave it, seen as [B, H, T, D].
    q, k, v = (bf16(s.count, s.length, s.heads, s.width).transpose(1, 2).requires_grad_(direction != "forward")
               for _ in range(3))
    state = []

    def forward():
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=s.causal)

    def both():
        output = forward()
        if not state:
            state.append(torch.randn_like(output))
        torch.autograd.grad(output, (q, k, v), state[0])

    def backward():
        if not state:
            state.append(forward())
            state.append(torch.randn_like(state[0]))
        torch.autograd.grad(state[0], (q, k, v), state[1], retain_graph=True)

    return {"forward": forward, "backward": backward, FORWARD_BACKWARD: both}[direction]


def flex_forward(s):
    """FlexAttention with the scalar-distance score, or the dot product's, where SDPA cannot do it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_, head, i, j):
        allowed = i >= j if s.causal else i == i
        return allowed & (i - j < s.window) if s.window else allowed

    # A tensor for each scalar: FlexAttention's indices are tensors only.
    scalars = lambda: torch.randn(s.count, s.heads, s.length, device=DEVICE)  # noqa: E731
    pairs = [(scalars(), scalars()) for _ in range(s.scalars)]
    gate = torch.zeros(s.count, s.heads, s.length, device=DEVICE)

    def distance(_, batch, head, i, j):
        value = gate[batch, head, i] - gate[batch, head, j] if s.causal else 0
        for ours, theirs in pairs:
            value = value - (ours[batch, head, i] - theirs[batch, head, j]).abs()
        return value

    masked = s.causal or s.window
    mask = create_block_mask(seen, None, None, s.length, s.length, device=DEVICE) if masked else None
    v = bf16(s.count, s.heads, s.length, s.width)
    key = bf16(s.count, s.heads, s.length, s.width) if not s.scalars else v.new_zeros(*v.shape[:3], 16)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: no_grad(compiled, key, key, v, distance if s.scalars else None, mask)


def norm(case):
    rows, channels = shape_of(case, 2)
    x = bf16(rows, channels, grad=True)
    rms_norm = lambda t: torch.nn.functional.rms_norm(t, (channels,), eps=1e-6)  # noqa: E731
    if case.startswith("forward"):
        compiled = torch.compile(rms_norm)
        return {"rms_norm, compiled": lambda: no_grad(compiled, x)}
    if not case.startswith("backward"):
        raise NoPeer("neither forward nor backward")
    # As in training: the gradient of the residual path is added in the same pass.
    outputs = torch.compile(lambda t: (rms_norm(t), t.clone()))(x)
    return {"rms_norm and residual, compiled": gradient(outputs, x, (bf16(rows, channels), bf16(rows, channels)))}


def no_grad(function, *arguments):
    with torch.no_grad():
        return function(*arguments)


def loss(case):
    rows, vocab = shape_of(case, 2)
    with_gradient = "gradient" in case
    logits = bf16(rows, vocab, grad=with_gradient)
    targets = torch.randint(vocab, (rows,), device="cuda")
    compiled = torch.compile(lambda t: torch.nn.functional.cross_entropy(t.float(), targets))
    if with_gradient:
        return {"cross_entropy, compiled": lambda: torch.autograd.grad(compiled(logits), logits)}
    return {"cross_entropy, compiled": lambda: no_grad(compiled, logits)}


def adamw(case):
    found = re.search(r"([\d.]+)\s*M\b", case)
    count = int(float(found.group(1)) * 1e6) if found else max((int(n) for n in re.findall(r"\d+", case)), default=0)
    if count < 1000 or "cast" in case:
        raise NoPeer("not a whole step")
    parameter = torch.nn.Parameter(torch.randn(count, device="cuda"))
    parameter.grad = torch.randn(count, device="cuda")
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return {"fused AdamW, f32 (no bf16 copy, no clearing of gradients)": optimizer.step}


def matmul(case):
    rows, inner, outer = shape_of(case, 3)
    direction, name = case.split()[0], "torch.matmul"
    if direction in ("forward", "peak"):
        x, w = bf16(rows, inner), bf16(outer, inner, scale=0.02).t()
        if "residual" in case:
            residual = bf16(rows, outer)
            return {"torch.addmm": lambda: torch.addmm(residual, x, w)}
        if "relu" in case:
            return {name + " and relu": lambda: torch.relu(torch.matmul(x, w))}
        return {name + (", bf16 output" if "f32" in case else ""): lambda: torch.matmul(x, w)}
    dy = bf16(rows, outer)
    if direction == "dx":
        w = bf16(outer, inner, scale=0.02)
        return {name: lambda: torch.matmul(dy, w)}
    if direction == "dw":
        x = bf16(rows, inner)
        return {name + ", bf16 output, not accumulated": lambda: torch.matmul(dy.t(), x)}
    raise NoPeer("neither forward, dx nor dw")


def embedding(case):
    if case.startswith("order"):
        raise NoPeer("the peer's backward pass puts the tokens in order itself")
    tokens, channels = shape_of(case, 2)
    vocab = word_number(case, "of", 0)
    if not vocab:
        raise NoPeer(f"no vocabulary in the name '{case}'")
    index = torch.randint(vocab, (tokens,), device="cuda")
    if "as in text" in case:
        index = torch.multinomial(1.0 / torch.arange(1, vocab + 1, device="cuda"), tokens, replacement=True)
    if case.startswith("forward"):
        table = bf16(vocab, channels)
        return {"embedding": lambda: torch.nn.functional.embedding(index, table)}
    dx = bf16(tokens, channels)
    return {"embedding_dense_backward, its sort included, bf16 output": lambda: torch.ops.aten.embedding_dense_backward(
        dx, index, vocab, -1, False)}


FAMILIES = {"attention": attention, "attention_tree": attention_tree, "dot": attention, "head": head, "norm": norm, "loss": loss, "adamw": adamw, "matmul": matmul,
            "embedding": embedding}

# ---- timing -----------------------------------------------------------------------------------------------------------------


class Timer:
    def __init__(self, samples):
        self.samples = samples
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.zeros(max(2 * l2, 256 << 20) // 8, dtype=torch.int64, device="cuda")

    def once(self, run, batch):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.sum()  # fills L2 with clean lines: written ones would be written back in the time of the run
        torch.cuda._sleep(2_000_000)  # about a millisecond
        start.record()
        for _ in range(batch):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / batch

    def microseconds(self, run):
        if isinstance(run, Scaled):
            run()
            return run.times * min(self.once(run, 1) for _ in range(2))
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        single = statistics.median(self.once(run, 1) for _ in range(self.samples))
        return single if single >= 10 else statistics.median(self.once(run, 20) for _ in range(self.samples))


def short(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def time_peers(row, timer):
    """{peer: time in us, or why it has none}."""
    if row["family"] not in FAMILIES:
        raise NoPeer("PyTorch has no such operation")
    times = {}
    for name, run in FAMILIES[row["family"]](row["case"]).items():
        try:
            times[name] = timer.microseconds(run)
        except Exception as error:  # pylint: disable=broad-except
            times[name] = f"cannot run it: {short(error)}"
    return times


def merge(row, times):
    """Adds the fastest peer to the row, or why there is none."""
    measured = {name: time for name, time in times.items() if not isinstance(time, str)}
    if measured:
        fastest = min(measured, key=measured.get)
        row["peer"], row["peer_time_us"] = fastest, round(measured[fastest], 3)
        row["ratio"] = round(measured[fastest] / row["time_us"], 4)
    else:
        row["peer"] = "none: " + "; ".join(f"{name} {why}" if name else why for name, why in times.items())
        row["peer_time_us"] = row["ratio"] = None


def pairs_of(rows):
    """[(family, shape, ours)] of attention cases whose forward and backward pass were both measured."""
    times = {(row["family"], row["case"]): row["time_us"] for row in rows if row["family"] in ("attention", "attention_tree", "dot")}
    found = []
    for (family, case), forward in times.items():
        direction, _, shape = case.partition(" ")
        if direction == "forward" and (family, "backward " + shape) in times:
            found.append((family, shape, forward + times[family, "backward " + shape]))
    return found


def compare(row, timer):
    """Adds peer, peer_time_us and ratio to the row, and returns the times of all its peers."""
    try:
        times = time_peers(row, timer)
    except NoPeer as why:
        times = {"": str(why)}
    except Exception as error:  # pylint: disable=broad-except
        times = {"PyTorch": f"failed: {short(error)}"}
    merge(row, times)
    ratio = "" if row["ratio"] is None else f"  {row['peer_time_us']:.2f} us, {row['ratio']:.2f} x ours"
    print(f"{row['family']:11} {row['case']:44} {row['peer']}{ratio}", flush=True)
    torch.cuda.empty_cache()
    return times


def main(arguments):
    global torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=pathlib.Path, help="what fiedler bench --json wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args(arguments)
    result = json.loads(options.bench.read_text())
    try:
        import torch as torch_module
    except ImportError:
        print("bench_peers: no PyTorch in this Python", file=sys.stderr)
        return 3
    torch = torch_module
    if not torch.cuda.is_available():
        print("bench_peers: PyTorch sees no GPU", file=sys.stderr)
        return 3
    torch.manual_seed(1)
    torch._dynamo.config.recompile_limit = 1000  # each shape is meant to be compiled for itself
    timer = Timer(options.samples)
    result["peers"] = {}
    result["peer_version"] = f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    for row in result["bench"]:
        result["peers"][f"{row['family']}/{row['case']}"] = compare(row, timer)
    result["pairs"] = []
    for family, shape, ours in pairs_of(result["bench"]):
        pair = {"family": family, "case": f"{FORWARD_BACKWARD} {shape}", "time_us": round(ours, 3)}
        pair["peers"] = compare(pair, timer)
        result["pairs"].append(pair)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""tools/train_peers.py --out FILE: training steps in PyTorch, to be held beside `fiedler bench step` on the same GPU.

  gpt2-d6          GPT-2 at width 384, 6 heads, 6 layers: learned positions, LayerNorm, GELU, scaled_dot_product_attention
  fiedler-s-d6     our architecture at that shape, one coordinate a head: gate, convolution, ReLU^2, tied head
  fiedler-sssb-d6  the same with the pattern sssb (eight coordinates in every fourth layer)

All: vocabulary 50,304, T = 1024, 32 sequences a step in one batch, torch.compile, bf16 autocast, fused AdamW, gradients
clipped at 1. The attention of our architecture is FlexAttention with the scalar-distance score, or, where that fails,
a score matrix in memory; `attention` says which. Tokens are random, their frequencies as in `fiedler bench step`.

A step is timed from its end to the next one's, after a warm-up that compiles; the median of --steps and
noise = (p90 - p10) / median. Peak memory is what PyTorch's allocator has reserved at most.

Exit codes: 0 done (a model that fails says so in its row), 2 bad usage, 3 no PyTorch or no GPU.
"""
import argparse
import collections
import json
import math
import pathlib
import statistics
import sys
import time

Shape = collections.namedtuple("Shape", "width heads layers vocab length batch")
D6 = Shape(width=384, heads=6, layers=6, vocab=50304, length=1024, batch=32)


def running_sum(x):
    """Along the last dimension, of a multiple of 32, in two levels: torch.compile's code for one long scan of few rows fails."""
    within = x.unflatten(-1, (-1, 32)).cumsum(-1)
    total = within[..., -1]
    return (within + (total.cumsum(-1) - total)[..., None]).flatten(-2)


def patterns():
    """{model: pattern of its attention, None: GPT-2}"""
    return {"gpt2-d6": None, "fiedler-s-d6": "s", "fiedler-sssb-d6": "sssb"}


def summary(seconds):
    """(median, noise) of times; noise as in the harness: (p90 - p10) / median."""
    ordered = sorted(seconds)
    at = lambda q: ordered[int(q * (len(ordered) - 1) + 0.5)]  # noqa: E731
    median = statistics.median(ordered)
    return median, (at(0.9) - at(0.1)) / median


def short(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- models (PyTorch is imported where it is used: the rest of this file is also read without it) ------------------------


def make_models(torch, device="cuda"):
    nn, functional = torch.nn, torch.nn.functional

    def normal(linear, std=0.02):
        nn.init.normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        return linear

    class GptBlock(nn.Module):
        def __init__(self, s):
            super().__init__()
            self.heads, out_std = s.heads, 0.02 / math.sqrt(2 * s.layers)
            self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
            self.qkv = normal(nn.Linear(s.width, 3 * s.width))
            self.out = normal(nn.Linear(s.width, s.width), out_std)
            self.up = normal(nn.Linear(s.width, 4 * s.width))
            self.down = normal(nn.Linear(4 * s.width, s.width), out_std)

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2)
                       for t in self.qkv(self.norm1(x)).split(width, dim=2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        """Blocks between a token embedding and the head that is tied to it."""

        def __init__(self, s, blocks, positions):
            super().__init__()
            self.tokens = nn.Embedding(s.vocab, s.width)
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.positions = nn.Parameter(torch.randn(s.length, s.width) * 0.02) if positions else None
            self.blocks = nn.ModuleList(blocks)
            self.norm = nn.LayerNorm(s.width) if positions else nn.RMSNorm(s.width, eps=1e-6, elementwise_affine=False)

        def forward(self, inputs, targets):
            x = self.tokens(inputs)
            if self.positions is not None:
                x = x + self.positions
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    def materialised(a, b, gate, v):
        """a, b: [B, H, T, R]; gate: [B, H, T]; v: [B, H, T, D]."""
        score = gate.unsqueeze(3) - gate.unsqueeze(2)
        for r in range(a.shape[3]):
            score = score - (a[..., r].unsqueeze(3) - b[..., r].unsqueeze(2)).abs()
        length = v.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool, device=v.device).tril()
        return torch.softmax(score.masked_fill(~seen, -math.inf), dim=3).to(v.dtype) @ v

    def flex(length):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda batch, head, i, j: i >= j, None, None, length, length, device=device)

        def attend(a, b, gate, v):
            # A tensor for each scalar: FlexAttention's indices are tensors only.
            scalars = [(a[..., r].contiguous(), b[..., r].contiguous()) for r in range(a.shape[3])]
            closed = -gate  # a tensor that wants a gradient may be indexed once

            def score(_, batch, head, i, j):
                value = gate[batch, head, i] + closed[batch, head, j]
                for ours, theirs in scalars:
                    value = value - (ours[batch, head, i] - theirs[batch, head, j]).abs()
                return value

            nothing = v.new_zeros(*v.shape[:3], 16)  # no product of queries and keys
            return flex_attention(nothing, nothing, v, score_mod=score, block_mask=mask)

        return attend

    class DistanceBlock(nn.Module):
        def __init__(self, s, scalars, attend):
            super().__init__()
            self.heads, self.scalars, self.attend = s.heads, scalars, attend
            out_std = 0.02 / math.sqrt(2 * s.layers)
            columns = 2 * s.heads * scalars
            self.norm = nn.RMSNorm(s.width, eps=1e-6, elementwise_affine=False)
            self.value = normal(nn.Linear(s.width, s.width, bias=False))
            self.extra = normal(nn.Linear(s.width, columns + s.heads, bias=False))
            self.gate_bias = nn.Parameter(torch.linspace(2, 8, s.heads))
            self.log_temperature = nn.Parameter(torch.full((s.heads,), -math.log(2 if scalars == 1 else 0.7)))
            first = torch.zeros(s.width + columns, 1, 4)
            first[:, 0, 3] = 1  # the convolution is the identity at the start
            self.conv = nn.Parameter(first)
            self.out = normal(nn.Linear(s.width, s.width, bias=False), out_std)
            self.up = normal(nn.Linear(s.width, 4 * s.width, bias=False))
            self.down = normal(nn.Linear(4 * s.width, s.width, bias=False), out_std)

        def causal_conv(self, x, first, count):
            # As four shifted products, which torch.compile fuses.
            taps, padded = self.conv[first:first + count, 0].to(x.dtype), functional.pad(x, (0, 0, 3, 0))
            return sum(padded[:, k:k + x.shape[1]] * taps[:, k] for k in range(4))

        def forward(self, x):
            batch, length, width = x.shape
            columns = 2 * self.heads * self.scalars
            n = self.norm(x)
            v = self.causal_conv(self.value(n), 0, width).reshape(batch, length, self.heads, -1).transpose(1, 2)
            extra = self.extra(n).float()
            with torch.autocast(device, enabled=False):
                scalars = self.causal_conv(extra[..., :columns], width, columns)
                scalars = scalars.reshape(batch, length, 2, self.heads, self.scalars)
                scalars = scalars * torch.exp(-self.log_temperature).view(1, 1, 1, self.heads, 1)
                a, b = (t.transpose(1, 2).contiguous() for t in scalars.unbind(2))
                gate = running_sum(functional.logsigmoid(extra[..., columns:] + self.gate_bias).transpose(1, 2).contiguous())
                y = self.attend(a, b, gate, v.to(torch.bfloat16).contiguous())
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(torch.relu(self.up(self.norm(x))).square())

    def build(s, pattern, attention):
        if pattern is None:
            return Model(s, [GptBlock(s) for _ in range(s.layers)], positions=True)
        attend = flex(s.length) if attention == "FlexAttention" else materialised
        letters = [pattern[i % len(pattern)] for i in range(s.layers)]
        return Model(s, [DistanceBlock(s, 8 if letter == "b" else 1, attend) for letter in letters], positions=False)

    return build


# ---- one training -----------------------------------------------------------------------------------------------------------


def synthetic(torch, s):
    """Tokens whose probability falls as 1 / rank."""
    u = torch.rand(2, s.batch, s.length, dtype=torch.float64)
    tokens = ((s.vocab + 1) ** u - 1).long().clamp(max=s.vocab - 1).cuda()
    return tokens[0], tokens[1]


def train(torch, build, s, pattern, attention, steps, warm_up):
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    model = build(s, pattern, attention).cuda()
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model, dynamic=False)
    inputs, targets = synthetic(torch, s)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    seconds, last, previous = [], time.perf_counter(), None
    for _ in range(steps + 1):  # the host waits for the step before last, as a training that logs its loss does
        loss, done = step(), torch.cuda.Event()
        done.record()
        if previous is not None:
            previous.synchronize()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        previous = done
    torch.cuda.synchronize()
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value}")
    median, noise = summary(seconds)
    return {"attention": attention or "scaled_dot_product_attention", "parameters": sum(p.numel() for p in parameters),
            "batch_tokens": s.batch * s.length, "steps": steps, "ms_per_step": round(median * 1e3, 4),
            "noise": round(noise, 4), "tokens_per_second": round(s.batch * s.length / median),
            "peak_memory_bytes": torch.cuda.max_memory_reserved(), "loss": round(value, 4)}


def measure(torch, build, name, pattern, s, steps, warm_up):
    failures = []
    for attention in (None,) if pattern is None else ("FlexAttention", "score matrix in memory"):
        try:
            row = {"name": name, **train(torch, build, s, pattern, attention, steps, warm_up)}
            return {**row, "note": "; ".join(failures)} if failures else row
        except Exception as error:  # pylint: disable=broad-except
            failures.append(f"{attention or 'training'} failed: {short(error)}")
    return {"name": name, "failure": "; ".join(failures)}


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--models", default=",".join(patterns()), help="models, separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    options = parser.parse_args(arguments)
    names = [name for name in options.models.split(",") if name]
    for name in names:
        if name not in patterns():
            parser.error(f"no model '{name}': {', '.join(patterns())}")
    try:
        import torch
    except ImportError:
        print("train_peers: no PyTorch in this Python", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("train_peers: PyTorch sees no GPU", file=sys.stderr)
        return 3
    build = make_models(torch)
    result = {"gpu": torch.cuda.get_device_name(), "peers": [],
              "version": f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"}
    for name in names:
        row = measure(torch, build, name, patterns()[name], D6, options.steps, options.warm_up)
        result["peers"].append(row)
        print(f"{name:16} " + (row.get("failure") or f"{row['ms_per_step']:.2f} ms a step, {row['tokens_per_second']:,} "
                               f"tokens/s, {row['peak_memory_bytes'] / 2**30:.1f} GiB, {row['attention']}"), flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # after each: a later one may be killed
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

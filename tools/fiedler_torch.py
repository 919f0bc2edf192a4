#!/usr/bin/env python3
"""Fiedler's architecture in PyTorch: every kind of layer, written from the formulas of DESIGN 1 and none of the engine's code.

    model = load("exported")                     # a folder of `fiedler export --format safetensors`
    loss = model.loss(inputs, targets)           # [batch, length] token ids; the mean over targets >= 0
    loss.backward()                              # model.parameters() carry the gradients
    save(model, "trained")                       # `fiedler import trained --out trained.fdl` reads it

It is the reference for loss and gradients (tests/torch_oracle.py), and the way in for models trained elsewhere. Slow: the
scores of all pairs lie in memory. Tensors have the names of data/README.md with the dots turned into underscores inside.
"""
import json
import math
import pathlib
import shutil

import torch
from torch import nn
from torch.nn import functional


def pattern_of(knobs):
    """[(letter, window)] of every layer: "sssb:128" tiled over the layers."""
    items, text = [], knobs["pattern"]
    while text:
        letter, text, digits = text[0], text[1:], ""
        if text.startswith(":"):
            text = text[1:]
            while text and text[0].isdigit():
                digits, text = digits + text[0], text[1:]
        items.append((letter, int(digits or 0)))
    return [items[i % len(items)] for i in range(knobs["layers"])]


def rms_norm(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def causal_conv(x, weight):
    """x: [B, T, C], weight: [C, 4], whose column 3 is the token itself."""
    padded = functional.pad(x.transpose(1, 2), (3, 0))
    return functional.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0]).transpose(1, 2)


def rotate(x, theta):
    """x: [B, T, H, D]: pairs (d, d + D/2) turned by position * theta^(-2d/D), clockwise."""
    length, half = x.shape[1], x.shape[3] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(length, dtype=x.dtype)[:, None, None] * frequency
    cosine, sine, low, high = angle.cos(), angle.sin(), x[..., :half], x[..., half:]
    return torch.cat([low * cosine + high * sine, high * cosine - low * sine], -1)


class Model(nn.Module):
    """knobs: the object "fiedler" of config.json; tensors: {name: tensor}."""

    def __init__(self, knobs, tensors, dtype=torch.float32):
        super().__init__()
        self.knobs, self.layers = knobs, pattern_of(knobs)
        constants = ("spectral.U", "feature_laplacian.")
        for name, tensor in tensors.items():
            if name.startswith(constants):
                self.register_buffer(name.replace(".", "_"), tensor.to(dtype))
            else:
                self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.to(dtype)))
        self.names = list(tensors)

    def tensor(self, name):
        return getattr(self, name.replace(".", "_"), None)

    def energies(self, x, layer, scalars):
        """Rayleigh quotients of head vectors [B, T, H, D] on the feature Laplacian: [B, T, H, R] in [0, 1)."""
        square = (x * x).sum(-1, keepdim=True) + 1e-6
        if scalars == 1:
            energy = (x * (x @ self.feature_laplacian_matrix)).sum(-1, keepdim=True) / square
        else:
            parts = (x @ self.feature_laplacian_eigenvectors.T) ** 2 * self.feature_laplacian_eigenvalues
            energy = parts.unflatten(-1, (scalars, -1)).sum(-1) / square
        return energy / (energy + self.tensor(f"layers.{layer}.attn.log_tau").exp())

    def score(self, layer, letter, n, q, k):
        """[B, H, T, T], before the mask."""
        heads, knobs = self.knobs["heads"], self.knobs
        if letter == "d":
            if knobs["qk-norm"]:
                q, k = rms_norm(q, knobs["norm-eps"]), rms_norm(k, knobs["norm-eps"])
            if knobs["rope"] != "none":
                q, k = rotate(q, knobs["rope-theta"]), rotate(k, knobs["rope-theta"])
            return torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        scalars = 1 if letter == "s" else knobs["scalars"]
        if knobs["scalar-kind"] == "coordinate":
            lam = n @ self.tensor(f"layers.{layer}.attn.scalars.weight").T
            if knobs["conv"]:
                lam = causal_conv(lam, self.tensor(f"layers.{layer}.attn.conv_scalars.weight"))
            a, b = (t.unflatten(-1, (heads, scalars)) for t in lam.chunk(2, -1))
        else:
            if knobs["rope"] == "all":
                q, k = rotate(q, knobs["rope-theta"]), rotate(k, knobs["rope-theta"])
            a, b = self.energies(q, layer, scalars), self.energies(k, layer, scalars)
        temperature = self.tensor(f"layers.{layer}.attn.log_temperature").exp()[:, None]
        a, b = (a / temperature).transpose(1, 2), (b / temperature).transpose(1, 2)
        score = -(a[:, :, :, None] - b[:, :, None]).abs().sum(-1)
        if knobs["gate"] and knobs["causal"]:
            z = n @ self.tensor(f"layers.{layer}.attn.gate.weight").T + self.tensor(f"layers.{layer}.attn.gate.bias")
            f = functional.logsigmoid(z).cumsum(1).transpose(1, 2)
            gate = f[..., :, None] - f[..., None, :]
            score = score + (gate if knobs["causal"] else -gate.abs())
        return score

    def attention(self, layer, n):
        letter, window = self.layers[layer]
        heads, length = self.knobs["heads"], n.shape[1]
        coordinate = letter != "d" and self.knobs["scalar-kind"] == "coordinate"
        name = f"layers.{layer}.attn.{'v' if coordinate else 'qkv'}.weight"
        projected = n @ self.tensor(name).T
        if self.knobs["conv"]:
            projected = causal_conv(projected, self.tensor(f"layers.{layer}.attn.conv.weight"))
        *qk, v = (t.unflatten(-1, (heads, -1)) for t in projected.split(n.shape[-1], -1))
        score = self.score(layer, letter, n, *(qk or (None, None)))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.knobs["causal"]:
            seen &= distance >= 0
        if window:
            seen &= distance.abs() < window
        weights = torch.softmax(score.masked_fill(~seen, -math.inf), -1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        return mixed @ self.tensor(f"layers.{layer}.attn.out.weight").T

    def forward(self, inputs):
        """Logits [B, T, V]."""
        eps = self.knobs["norm-eps"]
        x = self.embedding_weight[inputs]
        if self.knobs["spectral-dims"]:
            x = x + self.spectral_U[inputs] @ self.spectral_weight[:, : self.spectral_U.shape[1]].T
        for layer in range(len(self.layers)):
            x = x + self.attention(layer, rms_norm(x, eps))
            hidden = functional.relu(rms_norm(x, eps) @ self.tensor(f"layers.{layer}.mlp.in.weight").T) ** 2
            x = x + hidden @ self.tensor(f"layers.{layer}.mlp.out.weight").T
        return rms_norm(x, eps) @ (self.embedding_weight if self.knobs["tied"] else self.head_weight).T

    def loss(self, inputs, targets):
        return functional.cross_entropy(self.forward(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)


def load(folder, dtype=torch.float32):
    from safetensors.torch import load_file

    knobs = json.loads((pathlib.Path(folder) / "config.json").read_text())["fiedler"]
    return Model(knobs, load_file(pathlib.Path(folder) / "model.safetensors"), dtype)


def save(model, folder, tokenizer=None):
    """A folder for `fiedler import`; tokenizer: the path of a tokenizer.model to go with it."""
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: model.tensor(name).detach().float().contiguous() for name in model.names}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "fiedler", "fiedler": model.knobs}, indent=2) + "\n")
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")

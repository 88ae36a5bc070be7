"""Links by NumPy and PyTorch, as their public implementations write them; runs in pfl's environment.

``python links_runner.py VECTOR.npy '{"threads": 2}'`` reads lines ``library link``, encodes and decodes once for each,
and answers with ``{"seconds", "error"}``: the time, and ``|decoded - x|^2 / |x|^2``.
"""

import json
import math
import sys
import time

import numpy as np

SHARE, LEVELS, BLOCK = 0.01, 127, 2**12


def numpy_top_k(x):
    k = int(SHARE * x.size)
    where = np.argpartition(np.abs(x), -k)[-k:].astype(np.int32)
    values = x[where]
    out = np.zeros_like(x)
    out[where] = values
    return out


def numpy_qsgd(x, rng=np.random.default_rng(0)):
    norm = np.linalg.norm(x)
    scaled = np.abs(x) * (LEVELS / norm)
    low = np.floor(scaled)
    codes = ((low + (rng.random(x.size, np.float32) < scaled - low)) * np.sign(x)).astype(np.int8)
    return codes.astype(np.float32) * (norm / LEVELS)


def torch_links(torch):
    """The same by PyTorch."""

    def torch_top_k(x):
        k = int(SHARE * x.numel())
        where = torch.topk(x.abs(), k, sorted=False).indices
        values = x[where]
        return torch.zeros_like(x).scatter_(0, where, values)

    def torch_qsgd(x):
        norm = x.norm()
        scaled = x.abs().mul_(LEVELS / norm)
        low = scaled.floor()
        codes = low.add_((torch.rand_like(x) < scaled - low).float()).mul_(x.sign()).to(torch.int8)
        return codes.float().mul_(norm / LEVELS)

    def _hadamard(rows):
        """The orthonormal Walsh-Hadamard transform of each row, in place."""
        count, size = rows.shape
        half = 1
        while half < size:
            view = rows.view(count, size // (2 * half), 2, half)
            a, b = view[:, :, 0], view[:, :, 1]
            a.add_(b)
            b.mul_(-2).add_(a)
            half *= 2
        return rows.mul_(1 / math.sqrt(size))

    def torch_eden(x):
        """One bit: signs of the rotated vector, scaled to be unbiased; blocks that fit the cache."""
        size = -(-x.numel() // BLOCK) * BLOCK
        signs = torch.randint(0, 2, (size,), dtype=torch.float32).mul_(2).sub_(1)
        rows = torch.zeros(size)
        rows[: x.numel()] = x
        rows = _hadamard(rows.mul_(signs).view(-1, BLOCK))
        codes = rows > 0
        scale = rows.square().sum(1) / rows.abs().sum(1)
        back = codes.float().mul_(2).sub_(1).mul_(scale[:, None])
        return _hadamard(back).view(-1).mul_(signs)[: x.numel()]

    return {"top_k": torch_top_k, "qsgd": torch_qsgd, "eden": torch_eden}


def main(file, options):
    import torch

    links = {"numpy": {"top_k": numpy_top_k, "qsgd": numpy_qsgd}, "torch": torch_links(torch)}
    torch.set_num_threads(json.loads(options)["threads"])
    vector = np.load(file, allow_pickle=False)
    inputs = {"numpy": vector, "torch": torch.from_numpy(vector)}
    with torch.no_grad():
        for line in sys.stdin:
            library, link = line.strip().split(" ", 1)
            begin = time.perf_counter()
            out = links[library][link](inputs[library])
            seconds = time.perf_counter() - begin
            out = np.asarray(out, np.float64)
            error = float(np.sum((out - vector) ** 2) / np.sum(vector.astype(np.float64) ** 2))
            print(json.dumps({"seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Slow, obvious twins of the packings: element by element, in Python."""

import math

import torch


def pruned(x, keep, values=torch.bfloat16):
    """What the default packing makes of ``x`` (first dimension: samples), from its definition alone."""
    from backrazor.groups import groups_for
    from backrazor.layout import layout_of

    groups = groups_for(keep)
    layout = layout_of(x.shape[0], x[0].numel(), groups, "bf16")
    n, m, low = groups.n, -(-layout.size // groups.n), groups.place_bits
    flat, out = x.detach().reshape(layout.spans, layout.size), torch.zeros(layout.spans, layout.size, dtype=x.dtype)
    magnitudes = (flat.float().abs().view(torch.int32) >> low).tolist()
    for span in range(layout.spans):
        for column in range(m):
            rows = [r for r in range(n) if r * m + column < layout.size]
            rows.sort(key=lambda r, s=span, c=column: (magnitudes[s][r * m + c], r))
            for r in rows[-groups.k :]:
                out[span, r * m + column] = flat[span, r * m + column].float().to(values).to(x.dtype)
    return out.view(x.shape)


def low_bit(x, cut):
    """What the low-bit packing makes of ``x``, contiguous, a group at a time, from its definition alone."""
    flat = x.detach().float().reshape(cut.blocks, cut.rows, cut.columns)
    out, top = torch.empty_like(flat), (1 << cut.width) - 1
    for block in range(cut.blocks):
        for column in range(cut.columns):
            for start in range(0, cut.rows, cut.group):
                part = flat[block, start : start + cut.group, column]
                inside = (part.max() - part.min()) * (0.05 if cut.width == 2 else 0.0)
                first = (part.min() + inside).bfloat16().float()
                if first > part.min() + inside:  # downwards: the bfloat16 below
                    below = torch.nextafter(first.bfloat16(), torch.tensor(-torch.inf, dtype=torch.bfloat16))
                    first = below.float()
                step = ((part.max() - inside - first) / top).bfloat16().float()
                codes = ((part - first) * (1 / step)).round().clamp(0, top) if step > 0 else torch.zeros_like(part)
                out[block, start : start + cut.group, column] = codes * step + first
    return out.view(x.shape)


def paper_pruned(x, keep, values=torch.float16):
    """The official masker, a sample at a time: |x| at least the k-th smallest, k = int(clip(n · ratio, 1, n))."""
    out = torch.zeros_like(x)
    for i, sample in enumerate(x.detach()):
        n = sample.numel()
        k = int(min(max(n * (1 - keep), 1), n))
        threshold = sorted(sample.abs().flatten().tolist())[k - 1]
        kept = torch.tensor([v if abs(v) >= threshold else 0.0 for v in sample.flatten().tolist()], dtype=x.dtype)
        out[i] = kept.view(sample.shape).to(values).to(x.dtype)
    return out


def entropy(p):
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)

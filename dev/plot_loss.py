#!/usr/bin/env python3
"""Draws the losses of training runs as an SVG, from their metrics.jsonl.

usage: plot_loss.py OUT.svg LABEL=metrics.jsonl [LABEL=metrics.jsonl ...]

A thin line is the training loss (averaged over a hundredth of the run), dots are validations. Needs
nothing but Python.
"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 20, 20, 50
COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#8250df"]


def read(path):
    with open(path) as lines:
        rows = [json.loads(line) for line in lines]
    window = max(1, len(rows) // 100)
    train = []
    for begin in range(0, len(rows) - window + 1, window):
        part = rows[begin : begin + window]
        train.append((part[-1]["tokens"], sum(row["loss"] for row in part) / window))
    validation = [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    return train, validation


def ticks(low, high, count):
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    value = math.ceil(low / step) * step
    while value <= high + 1e-9 * step:
        yield value
        value += step


def short(value):
    return f"{value / 1e6:g}M" if value >= 1e5 else f"{value:g}"


def main():
    if len(sys.argv) < 3 or any("=" not in argument for argument in sys.argv[2:]):
        sys.exit(__doc__.strip())
    runs = [(label, *read(path)) for label, path in (a.rsplit("=", 1) for a in sys.argv[2:])]
    points = [p for _, train, validation in runs for p in train + validation]
    x_max = max(x for x, _ in points)
    y_min = min(y for _, y in points)
    y_max = max(y for _, _, validation in runs for _, y in validation) * 1.15
    y_min, y_max = math.floor(y_min * 5) / 5, math.ceil(y_max * 5) / 5

    def x_at(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_max

    def y_at(y):
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_max - min(y, y_max)) / (y_max - y_min)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for y in ticks(y_min, y_max, 8):
        out.append(f'<path d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in ticks(0, x_max, 8):
        out.append(f'<text x="{x_at(x):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{short(x)}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    out.append(f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" '
               f'transform="rotate(-90 16 {HEIGHT / 2})">nats per token</text>')
    for i, (label, train, validation) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in train)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-opacity="0.55"/>')
        for x, y in validation:
            out.append(f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.5" fill="{colour}"/>')
        y = TOP + 18 * (i + 1)
        out.append(f'<text x="{WIDTH - RIGHT - 10}" y="{y}" text-anchor="end" fill="{colour}">'
                   f"{label}: line training, dots validation</text>")
    out.append("</svg>")
    with open(sys.argv[1], "w") as file:
        file.write("\n".join(out) + "\n")


main()

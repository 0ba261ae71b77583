#!/usr/bin/env python3
"""Holds the tokenizer against the `tokenizers` package.

  tables   src/tokenizer/unicode_tables.inc: where that package's Unicode differs from PCRE2's and utf8proc's
  train    tests/data/tokenizers/llama3-style.json: a small tokenizer in the form of Llama 3's
  goldens  tests/data/tokenizers/goldens.json: texts and ids for the committed tests
  compare  random texts through `mamba3 tokenize` and the package, until one differs

Needs `pip install tokenizers unicodedata2`; `tables` also a Python whose unicodedata is not newer than
Unicode 14, the version of the oldest PCRE2 that is supported (10.40).
"""

import argparse
import copy
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data/tokenizers"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

# ---- tables ----------------------------------------------------------------------------------------

CATEGORIES = """Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co
                Cn""".split()


def matching(pattern):
    """The code points that the package's regular expressions match with `pattern`."""
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    found = set()
    for i in range(0, len(CODE_POINTS), 4096):
        text = "".join(map(chr, CODE_POINTS[i : i + 4096]))
        for piece, _ in split.pre_tokenize_str(text):
            found.update(map(ord, piece))
    return found


def stand_ins():
    """(first, last, stand-in): code points whose category differs between Unicode 14, the package's
    version and the newest; each is replaced by one of the package's category that never differs."""
    import unicodedata2

    if float(unicodedata.unidata_version.rsplit(".", 1)[0]) > 14:
        sys.exit(f"unicodedata is of Unicode {unicodedata.unidata_version}: run with Python 3.11")
    category = {c: name for name in CATEGORIES for c in matching(rf"\p{{{name}}}")}
    same, differing = {}, [0x180E]  # a space to PCRE2
    for c in CODE_POINTS:
        length = len(chr(c).encode())
        if not category[c] == unicodedata.category(chr(c)) == unicodedata2.category(chr(c)):
            differing.append(c)
        elif c > 0x7F and c != 0x180E:
            same.setdefault((category[c], length), c)
    same["Cn", 3], same["Cn", 4] = 0xFDD0, 0x10FFFF  # never assigned
    return ranges((c, same[category[c], len(chr(c).encode())]) for c in sorted(differing))


def inert_in_nfc():
    """(first, last): code points that are newer than the package's normaliser, so that it neither
    reorders nor composes them; and U+11A7, which some versions of utf8proc swallow."""
    import unicodedata2

    ours = normalizers.NFC().normalize_str
    new = lambda s: unicodedata2.normalize("NFC", s)
    old_marks = set(range(0x300, 0x370))
    inert = {0x11A7}
    for c in CODE_POINTS:
        s = chr(c)
        # U+0334 and U+0345 have the lowest and the highest combining class.
        if any(new(t) != ours(t) for t in (s, "a" + s + "\u0334", "a\u0345" + s, "a\u035d" + s)):
            inert.add(c)
        parts = unicodedata2.decomposition(s).split()
        if parts and not parts[0].startswith("<"):
            text = "".join(chr(int(part, 16)) for part in parts)
            if new(text) != ours(text):
                inert.update({c, *map(ord, text)} - old_marks)
    return ranges((c, None) for c in sorted(inert))


def ranges(items):
    """Runs of consecutive (code point, value) with equal values as (first, last, value)."""
    runs = []
    for c, value in items:
        if runs and runs[-1][1] == c - 1 and runs[-1][2] == value:
            runs[-1][1] = c
        else:
            runs.append([c, c, value])
    return runs


def table(declaration, rows):
    """A C++ array of rows, filled to 100 columns."""
    lines, line = [f"{declaration}[] = {{"], "   "
    for row in rows:
        item = " {" + ", ".join(f"0x{x:X}" for x in row if x is not None) + "},"
        if len(line + item) > 100:
            lines.append(line)
            line = "   "
        line += item
    return "\n".join(lines + [line, "};"])


def tables(_):
    text = "// Written by dev/tokenizer_oracle.py tables.\n\n// clang-format off\n"
    text += "// First, last, stand-in of the same category.\n"
    text += table("constexpr StandIn kStandIns", stand_ins()) + "\n\n"
    text += "// Characters that the reference's normaliser leaves alone.\n"
    text += table("constexpr Range kInertInNfc", inert_in_nfc()) + "\n// clang-format on\n"
    (ROOT / "src/tokenizer/unicode_tables.inc").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("tables").set_defaults(run=tables)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

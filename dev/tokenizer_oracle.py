#!/usr/bin/env python3
"""Holds the tokenizer against the `tokenizers` package.

  tables   src/tokenizer/unicode_tables.inc: where its Unicode differs from PCRE2's and utf8proc's
  train    tests/data/tokenizers/llama3-style.json: a small tokenizer in the form of Llama 3's
  goldens  tests/data/tokenizers/goldens.json: texts and ids for the committed tests
  compare  random texts through `mamba3 tokenize` and the package, until one differs

Needs `pip install tokenizers unicodedata2`; `tables` also a Python whose unicodedata is not newer
than Unicode 14, the version of the oldest PCRE2 that is supported (10.40).
"""

import argparse
import array
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data/tokenizers"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

# ---- tables --------------------------------------------------------------------------------------

CATEGORIES = (
    """Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co
                Cn""".split()
)


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


# ---- train ---------------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2)]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Tokens that no merges lead to: only ignore_merges finds them.
WHOLE_WORDS = [
    "ĠWhale",
    "ĠQueequeg",
    "ĠWoodhouse",
    "xylophone",
    "ĠĠĠĠĠĠĠĠ",
    "999",
    "Ġnaïve",
    "ĠÃ¼ber",
]
FOREIGN = [
    "Größe, naïve, façade, Ελληνικά και ελληνικά, по-русски говорят, שלום עולם, العربية",
    "日本語の文章です。中文的句子。 한국어 문장입니다. ไทย हिन्दी தமிழ்",
    "👍🏽 👩‍👩‍👧‍👦 😀😀 ❤️ → ⇒ “quoted” ‘it’ — – … € £ №",
]


def train(args):
    """A small BPE, trained on books out of copyright and on a few lines in other scripts."""
    lines = FOREIGN * 40
    for file in sorted(args.texts.glob("*.txt")):
        lines += file.read_text(errors="replace").splitlines(keepends=True)[:1500]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)

    file = json.loads(tokenizer.to_str())
    vocab = file["model"]["vocab"]
    for word in WHOLE_WORDS:
        vocab[word] = len(vocab)
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin}:1 $B:1",
                special_tokens=[(begin, tokenizer.token_to_id(begin))],
            ),
        ]
    )
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "llama3-style.json").write_text(text + "\n")


# ---- texts ---------------------------------------------------------------------------------------

EDGES = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "Hello world's end, I'LL say we'Ve it'S don'T 'RE 'ſ 'tis ''s",
    "<|endoftext|>",
    "a <|endoftext|> b",
    "a  <|endoftext|><|endoftext|>  b <|endoftext|>\n",
    "<|begin_of_text|>Hi<|eot_id|> <|end_of_text|>\n<|eot_id|",
    "<|reserved_special_token_0|><|reserved_special_token_1|><|reserved_special_token_2|>",
    "<<|end_of_text|>|> <|end_of_text <|<|eot_id|>",
    " Whale Queequeg Woodhouse xylophone 999 1999 9999 naïve über",
    "1 12 123 1234 12345 123456 1234567 ½ ² Ⅷ ١٢٣ १२३४",
    "a b  c   d    e     f      g       h        i         j",
    " " * 23 + "x" + " " * 24 + "y" + " " * 25 + "z" + " " * 60,
    "\n\n\n  \n \r\n\r\n\t\t x\r\n  \t \n",
    "tabs\tand\t\ttabs \t mixed \u00a0nbsp\u00a0\u00a0 \u2003em\u2028line\u2029par\u0085nel\u180evs\u200bzw",
    "e\u0301 \u00e9 a\u0308\u0304 \u01d5 q\u0323\u0307 q\u0307\u0323 \u212b \u2126 \u0344 \u0958 \u2adc",
    "\u1100\u1161\u11a8 \uac00\u11a8 \uac00\u11a7 \uac01\u11a8 \u1100\u1161\u11a7\u11a8 \ud55c\uae00",
    "\u0301\u0301abc\u0334\u0327\u0301 \u0345\u0334 \u0f71\u0f72\u0f74 \u0fb2\u0f71\u0f80",
    "日本語の文章です。中文的句子,混合English和123数字。",
    "한국어 문장입니다. ไทยภาษา हिन्दी में தமிழ் العربية ١٢٣ עברית",
    "👍🏽👩‍👩‍👧‍👦 😀😀\u200d🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣",
    "\x00\x01\x02\x1f\x7f\x80\x9f\xad\ufeff\ufffd\uffff\U0010ffff",
    "def f(x):\n    return x**2  # square\n\n\tif x != 0:\r\n        pass",
    "https://example.org/a?b=c&d=%20#e user@mail.example C:\\dir\\file ~/.bashrc $HOME",
    "((((((((((----------==========)))))))))) ... ..... !!! ?!?! \"'`´’‘“”",
    "ǅ ǈ ª º ʰ ໆ ㋿ 𝐀𝑏 𞤀 𐐀 \U00016d40 \U0001e5d0 \U0001ccf0 \U000323b0 \U00011f00 \U0001f6d8",
    "[MASK] [MASK]x x[MASK] a [MASK]  b\u00a0[MASK]\u2003\nc <mask> <mask>\n\n<mask>é<mask>9",
    "word wordy sword word.word_word word-word éword word\u0301 \u200dword ⓐword",
    "cafe\u0301 caf\u00e9 cafe \u00c5ngstr\u00f6m A\u030angstro\u0308m",
    "x" * 300 + " " + "ab" * 200 + " " + "é" * 100,
]


def random_text(rng, length):
    """Text of pieces that tokenizers are known to disagree on."""
    marks = [chr(c) for c in range(0x300, 0x370)] + list(
        "\u0483\u05b0\u0e38\u1ab0\u1dfa\u20d0\u3099\ufe20"
    )
    jamo = [
        chr(c) for c in [*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A7, 0x11C3)]
    ]
    spaces = list(
        " \t\n\r\v\f\u0085\u00a0\u1680\u180e\u2002\u2028\u2029\u202f\u205f\u3000\u200b"
    ) + ["\r\n", "  "]
    words = "the The of and I'm don't we'll it's IT'S he'd you've they're hello naïve 'S 'LL café".split()
    added = [*SPECIAL, "<|endoftext|>", "<|padding|>", "[MASK]", "<mask>", "word", "<|", "|>"]
    kinds = [
        lambda: rng.choice(words),
        lambda: " " + rng.choice(words),
        lambda: rng.choice(spaces) * rng.choice([1, 1, 1, 2, 3, 7, 30]),
        lambda: " " * rng.randint(1, 30),
        lambda: "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8))),
        lambda: rng.choice("aeiouAEIOUnN")
        + "".join(rng.choice(marks) for _ in range(rng.randint(1, 4))),
        lambda: "".join(rng.choice(jamo) for _ in range(rng.randint(1, 4))),
        lambda: chr(rng.randint(0xAC00, 0xD7A3)),
        lambda: "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 4))),
        lambda: chr(rng.randint(0x1F300, 0x1FAFF))
        + rng.choice(["", "\u200d", "\ufe0f", "\U0001f3fd"]),
        lambda: "".join(
            rng.choice("!?.,;:-_=+*/\\|<>()[]{}#$%&@^~`\"'") for _ in range(rng.randint(1, 5))
        ),
        lambda: rng.choice(["'", "’", "ʼ"]) + rng.choice("sStTmMdDſ"),
        lambda: rng.choice(added),
        lambda: chr(rng.randint(0, 0x1F)),
        lambda: chr(rng.randint(0x80, 0x24F)),
        lambda: chr(rng.randint(0x250, 0xD7FF)),
        lambda: chr(
            rng.choice([c for c in (rng.randint(0xE000, 0x10FFFF), rng.randint(0x10000, 0x1FFFF))])
        ),
    ]
    text = ""
    while len(text) < length:
        text += rng.choice(kinds)()
    return text


# ---- goldens -------------------------------------------------------------------------------------


def byte_level(prefix=False, regex=True):
    return {
        "type": "ByteLevel",
        "add_prefix_space": prefix,
        "trim_offsets": True,
        "use_regex": regex,
    }


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*parts, byte_level(regex=False)]}
    }


def added(first, *tokens):
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return [{"id": first + i, **flags, **token} for i, token in enumerate(tokens)]


def variants(base):
    """Changes (RFC 7396) to the committed tokenizer, so that one file exercises every option."""
    first = len(base["model"]["vocab"])
    gpt2 = {"pre_tokenizer": byte_level(), "model": {"ignore_merges": False}}
    nfc = {**gpt2, "normalizer": {"type": "NFC"}}
    spaces = added(first, *[{"content": " " * n, "normalized": True} for n in range(24, 1, -1)])
    unknown = {"vocab": {c: None for c in "āĂăĄ"}, "ignore_merges": False}  # bytes 1 to 4
    # Four tokens fewer: the ids of the added tokens move.
    fewer = {"added_tokens": None, "post_processor": None}
    yield "llama3", {}
    yield "merges", {"model": {"ignore_merges": False}}
    yield "gpt2", gpt2
    yield "prefix space", {"pre_tokenizer": byte_level(prefix=True)}
    yield "no regex", {"pre_tokenizer": byte_level(regex=False)}
    yield "split and prefix space", {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split(LLAMA3), byte_level(prefix=True, regex=False)],
        }
    }
    yield "nfc", {**nfc, "added_tokens": spaces, "post_processor": None}
    yield "nfc in sequence", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}
    yield "empty sequence", {"normalizer": {"type": "Sequence", "normalizers": []}}
    yield "flags", {
        **nfc,
        "added_tokens": added(
            first,
            {"content": "[MASK]", "lstrip": True, "special": True},
            {"content": "<mask>", "rstrip": True, "lstrip": True},
            {"content": "word", "single_word": True},
            {"content": "cafe\u0301", "normalized": True},
            {"content": "  ", "normalized": True, "rstrip": True},
            {"content": "<|", "rstrip": True, "normalized": True},
        ),
        "post_processor": None,
    }
    for behavior in "Removed Contiguous MergedWithPrevious MergedWithNext".split():
        yield behavior, sequence(split(r"\s", behavior))
        yield behavior + " inverted", sequence(split(r"\p{L}+", behavior, invert=True))
    yield "string pattern", sequence(split(" ", "MergedWithNext", kind="String"))
    yield "empty matches", sequence(split("a*", "MergedWithPrevious"))
    yield "three splits", sequence(
        split(r"[\p{P}\p{S}]++", "Contiguous"),
        split("[0-9][0-9]"),
        split(r"^\s*|\n$|(?<=e)(?=[^a-z])"),
    )
    yield "bytes dropped", {**gpt2, **fewer, "model": unknown}
    yield "unknown", {**gpt2, **fewer, "model": {**unknown, "unk_token": "!"}}
    yield "unknown fused", {
        **gpt2,
        **fewer,
        "model": {**unknown, "unk_token": "!", "fuse_unk": True},
    }
    yield "template", {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "x", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [first], "tokens": ["b"]},
                "x": {"id": "x", "ids": [5, first + 1], "tokens": ["a", "b"]},
            },
        }
    }


def merge_patch(target, patch):
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merge_patch(target.get(key), value)
    return target


def checksum(ids):
    return [len(ids), zlib.crc32(array.array("i", ids).tobytes())]


# Where Unicode has characters, and in planes 2, 3 and 14 where it gets new ones.
BLOCKS = [*range(0, 0x20000, 0x1000), 0x2E000, 0x2F000, 0x31000, 0x32000, 0x33000, 0x3D000, 0xE0000]


def blocks(tokenizer):
    """[first code point, checksum] for blocks of 4096, of texts in which each of them stands in many
    places. The test builds the same texts."""
    sums = []
    for first in BLOCKS:
        text = "".join(
            f"a{c}1 {c} {c}{c}'{c}e\u0301\u0334{c}\u11a8\n"
            for c in map(chr, range(first, first + 4096))
            if not 0xD800 <= ord(c) < 0xE000
        )
        sums.append([first, checksum(tokenizer.encode(text).ids)[1]])
    return sums


def golden(tokenizer, texts):
    return [tokenizer.encode(text).ids for text in texts]


def goldens(args):
    rng = random.Random(1)
    texts = EDGES + [random_text(rng, rng.randint(5, 80)) for _ in range(120)]
    base = json.loads((DATA / "llama3-style.json").read_text())
    result = {"texts": texts, "variants": [], "shared": []}
    for name, patch in variants(base):
        tokenizer = Tokenizer.from_str(json.dumps(merge_patch(base, patch)))
        entry = {"name": name, "patch": patch}
        ids = golden(tokenizer, texts)
        if patch:
            entry["checksums"] = [checksum(x) for x in ids]
        else:
            entry["ids"] = ids
        if name in ("llama3", "gpt2", "nfc"):
            entry["blocks"] = blocks(tokenizer)
        result["variants"].append(entry)
    for file in sorted(args.tokenizers.glob("*.json")):
        tokenizer = Tokenizer.from_file(str(file))
        size = tokenizer.get_vocab_size()
        random_ids = [[rng.randrange(size) for _ in range(12)] for _ in range(60)]
        books = {}
        for book in sorted(args.texts.glob("*.txt")):
            try:
                books[book.name] = checksum(tokenizer.encode(book.read_bytes().decode()).ids)
            except UnicodeDecodeError:
                print(f"{book.name} is not UTF-8: left out")
        result["shared"].append(
            {
                "file": file.name,
                "ids": golden(tokenizer, texts),
                "books": books,
                "decoded": [
                    [ids, tokenizer.decode(ids, skip_special_tokens=False)] for ids in random_ids
                ],
            }
        )
    text = json.dumps(result, ensure_ascii=True, separators=(",", ":"))
    (DATA / "goldens.json").write_text(text.replace("],[", "],\n[") + "\n")


# ---- compare -------------------------------------------------------------------------------------


def program_ids(program, file, text):
    command = [program, "tokenize", "--tokenizer", file]
    return json.loads(
        subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    )


def shrink(differs, text):
    """A short part of `text` that still differs."""
    size = len(text) // 2
    while size > 0:
        for i in range(0, len(text), size):
            shorter = text[:i] + text[i + size :]
            if differs(shorter):
                text = shorter
                break
        else:
            size //= 2
    return text


def compare(args):
    base = json.loads((DATA / "llama3-style.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(args.tokenizers.glob("*.json"))
        for name, patch in variants(base):
            files.append(Path(folder) / f"{name}.json")
            files[-1].write_text(json.dumps(merge_patch(base, patch)))
        tokenizers = [(str(file), Tokenizer.from_file(str(file))) for file in files]
        for seed in range(args.seed, args.seed + args.rounds):
            text = random_text(random.Random(seed), args.length)
            for file, tokenizer in tokenizers:
                differs = (
                    lambda t: program_ids(args.program, file, t)
                    != tokenizer.encode(t, add_special_tokens=False).ids
                )
                if differs(text):
                    short = shrink(differs, text)
                    ours, theirs = (
                        program_ids(args.program, file, short),
                        tokenizer.encode(short).ids,
                    )
                    sys.exit(f"seed {seed}, {file}: {short!r}\n  ours {ours}\n  want {theirs}")
        print(
            f"{args.rounds} texts of {args.length} characters, {len(tokenizers)} tokenizers: no difference"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shared = ROOT.parent / "shared/data"
    parser.add_argument("--texts", type=Path, default=shared / "text", help="folder of *.txt")
    parser.add_argument(
        "--tokenizers", type=Path, default=shared / "tokenizers", help="folder of *.json"
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("tables").set_defaults(run=tables)
    commands.add_parser("train").set_defaults(run=train)
    commands.add_parser("goldens").set_defaults(run=goldens)
    command = commands.add_parser("compare")
    command.add_argument("--program", default=ROOT / "build/mamba3")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--rounds", type=int, default=20)
    command.add_argument("--length", type=int, default=20000)
    command.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""Writes dict.txt.gz and hmm.txt.gz from the Python package jieba 0.42.1.

    pip install jieba==0.42.1
    python gen_tables.py

dict.txt.gz: first line the sum of all counts as Python's loader gets it (a word listed twice counts
twice), then `word count`, sorted by code point, each word once. hmm.txt.gz: `char B E M S`, the natural
log of the chance that the state emits the character, `-` where the model has none, sorted by code point.
"""

import gzip
import pathlib

import jieba
from jieba.finalseg import emit_P

HERE = pathlib.Path(__file__).parent


def write(name, lines):
    data = ("\n".join(lines) + "\n").encode("utf-8")
    # A fixed time stamp: the same tables give the same bytes.
    (HERE / name).write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


def main():
    counts, total = jieba.dt.gen_pfdict(jieba.dt.get_dict_file())
    words = sorted((w, c) for w, c in counts.items() if c)
    write("dict.txt.gz", [str(total)] + [f"{w} {c}" for w, c in words])
    chars = sorted(set().union(*(emit_P[s] for s in "BEMS")))
    write(
        "hmm.txt.gz",
        [" ".join([c] + [repr(emit_P[s][c]) if c in emit_P[s] else "-" for s in "BEMS"]) for c in chars],
    )


if __name__ == "__main__":
    main()

"""Builds a FAISS index of a corpus: python tools/build_index.py --corpus wiki-18.jsonl --out index --encoder ..."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from searche1.types import UserError

REPORT_EVERY_S = 2.0


class ProgressLine:
    """Prints rows done, total and rate, every few seconds and at the end."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < REPORT_EVERY_S:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-6)
        print(f"{done:,} / {total:,} passages, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the FAISS index of a corpus.")
    parser.add_argument("--corpus", type=Path, required=True, help='.jsonl or .jsonl.gz of {"id", "contents"} rows')
    parser.add_argument("--out", type=Path, required=True, help="folder to make: index.faiss and manifest.json")
    parser.add_argument(
        "--encoder", default="minilm", help="minilm (small, default), or a HuggingFace folder or hub id"
    )
    parser.add_argument("--style", default="", help="how that encoder was trained: e5, bge or plain; known for minilm")
    parser.add_argument("--kind", default="Flat", help="Flat (exact, the protocol) or HNSW64 (approximate)")
    parser.add_argument("--device", default="auto", help="device of the encoder: auto, cpu or cuda")
    arguments = parser.parse_args()

    from searche1.retrieval.encoder import load_encoder
    from searche1.retrieval.index import build_index

    try:
        encoder = load_encoder(arguments.encoder, arguments.device, style=arguments.style)
        build_index(
            corpus=arguments.corpus, out=arguments.out, encoder=encoder, kind=arguments.kind, progress=ProgressLine()
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decode a long prompt with Twilight and show what it saved.

    python examples/decode.py selector=quest p=0.95
    python examples/decode.py model=hf model.path=Qwen/Qwen3-0.6B task.prompt=book.txt budget=0.25
    python examples/decode.py -m 'selector=glob(*)' p=0.85,0.95

The same function as ``twilight decode``; ``--help`` lists every option.
"""

from twilight.cli import decode

if __name__ == "__main__":
    raise SystemExit(decode())

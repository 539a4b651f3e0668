"""Measurements whose results are kept, and the pages that are made from them.

Each folder has a ``run.py``, which makes results, and a ``report.py``, which turns them into
tables and sentences. From the root of the repository::

    python -m benchmarks.wire.run --model MODEL --data DOLLY.jsonl   # run, then write the page
    python -m benchmarks.wire.run --table                            # write the page alone
    python -m benchmarks.pages                                       # write every page
"""

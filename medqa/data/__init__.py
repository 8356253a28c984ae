"""From files, Kaggle and the Hugging Face Hub to rows, splits and an update's micro-batches.

Read in this order: `sources.py` (whose rows, and which are kept), `readers.py` (from any place or format to records),
`splits.py` (which rows may be trained on, and what held-out rows share with them), `batches.py`.
"""

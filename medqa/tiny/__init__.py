"""The embedded base model and sample data: `train.py --tiny` and the tests run on them, offline and on a CPU."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
MEDQUAD_CSV = Path(__file__).parent / "medquad.csv"
AFRIMEDQA_CSV = Path(__file__).parent / "afrimedqa.csv"

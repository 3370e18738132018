"""Measure how often the intervals contain the truth and save it with the library: `python tools/measure_coverage.py`."""
from pathlib import Path

from strip_notebooks.metrics.coverage import coverage_table

if __name__ == '__main__':
    path = Path(__file__).parents[1]/'strip_notebooks'/'assets'/'coverage.csv'
    coverage_table().to_csv(path, index=False)
    print(path)

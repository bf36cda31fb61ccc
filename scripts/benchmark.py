"""Speed of ShortV and other methods against the stock Hugging Face class: `shortv bench` without the `cli` extra.

python scripts/benchmark.py --help
"""

from shortv_hf.benchmark import main


if __name__ == "__main__":
    try:
        main(program="python scripts/benchmark.py")
    except ValueError as error:
        raise SystemExit(str(error)) from None

"""Speed and memory against the stock Hugging Face class, on real architectures with random weights."""

"""The paper's applications, each measured on many images: what moved, what stayed, against baselines."""

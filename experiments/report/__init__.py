"""The paper's figures, measured here, on one page: make report."""

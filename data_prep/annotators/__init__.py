"""Who labels images: an annotator turns source samples into labels, or says why one has none."""
